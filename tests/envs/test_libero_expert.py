"""How LIBERO's scripted expert chooses a grasp, without the simulator."""

import numpy as np
import pytest
from numpy.typing import NDArray

from vlafit.envs.experts_libero import LiberoExpert, plan_grasp
from vlafit.errors import SimulationError
from vlafit.types import EpisodeKey, Observation

HEIGHT = 0.1


def box(x: float, y: float, z: float, at: tuple[float, float] = (0, 0)) -> NDArray[np.float64]:
    """Points of a box of these lengths that stands on the ground."""
    sides = [np.linspace(-x / 2, x / 2, 5), np.linspace(-y / 2, y / 2, 5), np.linspace(0, z, 5)]
    points = np.stack(np.meshgrid(*sides), -1).reshape(-1, 3)
    points[:, :2] += at
    return points


def bowl(radius: float) -> NDArray[np.float64]:
    """Points of a round wall."""
    angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    ring = radius * np.stack([np.cos(angles), np.sin(angles)], -1)
    return np.concatenate([np.c_[ring, np.full(48, height)] for height in np.linspace(0, 0.05, 5)])


def facts(points: NDArray[np.float64], around: NDArray[np.float64] | None = None) -> dict[str, NDArray]:
    return {
        "points": points,
        "around": np.empty((0, 3)) if around is None else around,
        "fingers": np.array([[0, -0.04, 0.3], [0, 0.04, 0.3]]),  # along y
        "grasped": np.zeros(1),
    }


def test_a_box_is_grasped_across_its_narrow_side_below_its_top() -> None:
    grasp = plan_grasp(facts(box(0.05, 0.12, HEIGHT, (0.3, 0.1))))
    np.testing.assert_allclose(np.abs(grasp.axis), [1, 0], atol=1e-9)
    np.testing.assert_allclose(grasp.point[:2], [0.3, 0.1], atol=1e-9)
    assert HEIGHT - 0.04 < grasp.point[2] < HEIGHT


def test_a_bowl_is_grasped_at_its_rim_with_the_least_turn_of_the_hand() -> None:
    grasp = plan_grasp(facts(bowl(0.06)))
    np.testing.assert_allclose(np.abs(grasp.axis), [0, 1], atol=1e-9)
    assert 0.045 < np.linalg.norm(grasp.point[:2]) < 0.06


def test_fingers_keep_clear_of_what_stands_beside_the_rim() -> None:
    near, far = (box(0.02, 0.02, 0.2, (0, y)) for y in (0.1, -0.1))
    grasp = plan_grasp(facts(bowl(0.06), np.concatenate([near, far])))
    assert abs(grasp.axis[1]) < 0.98
    one_side = plan_grasp(facts(bowl(0.06), near))
    np.testing.assert_allclose(one_side.axis, [0, -1], atol=1e-9)


def test_a_task_without_one_object_to_move_is_refused_by_name() -> None:
    seen = Observation({}, np.zeros(8, np.float32), "turn on the stove")
    with pytest.raises(SimulationError, match="task 'stove'.*one object to move"):
        LiberoExpert().act([seen], [EpisodeKey(0, "stove", 0)])
