"""How LIBERO's scripted expert picks up and places, without the simulator."""

import numpy as np
import pytest
from numpy.typing import NDArray

from vlafit.envs.experts_libero import LiberoExpert
from vlafit.envs.experts_libero_place import LOST, plan_grasp
from vlafit.envs.libero_control import METRES
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


class Table:
    """A hand, a box and a wall on a table; the hand stops short by `friction` metres at every step."""

    def __init__(self, friction: float = 0.0) -> None:
        self.hand, self.object = np.array([-0.1, 0.05, 0.3]), np.zeros(3)
        self.wall = box(0.02, 0.3, 0.15, (0.15, 0))
        self.shape, self.friction, self.closed, self.contact = box(0.04, 0.06, 0.06), friction, 0, True

    def seen(self) -> Observation:
        values = {
            "points": self.shape + self.object,
            "object": self.object.copy(),
            "place": np.array([0.3, 0.0, 0.0]),
            "inside": np.zeros(1),
            "rim": np.zeros(1),
            "around": self.wall,
            "hand": self.hand.copy(),
            "hand_rotation": np.diag([1.0, -1.0, -1.0]),
            "fingers": np.array([[-0.04, 0, 0], [0.04, 0, 0]]) + self.hand,  # along x
            "grasped": np.array([float(self.closed > 3 and self.contact)]),
        }
        return Observation({}, np.zeros(8, np.float32), "move the box", values)

    def apply(self, action: NDArray[np.float32]) -> None:
        assert np.abs(action).max() <= 1
        shift = action[:3].astype(np.float64) * METRES
        shift = np.sign(shift) * np.maximum(np.abs(shift) - self.friction, 0)
        near = np.linalg.norm((self.hand - self.object)[:2]) < 0.02 and self.hand[2] - self.object[2] < 0.07
        self.closed = self.closed + 1 if action[6] > 0 and near else 0
        self.hand += shift
        if self.closed > 3:
            self.object += shift
        else:
            self.object[2] = 0.0


def play(table: Table, steps: int, expert: LiberoExpert, first: int = 0) -> list[NDArray[np.float32]]:
    actions = []
    for step in range(first, first + steps):
        actions.append(expert.act([table.seen()], [EpisodeKey(0, "move", step)])[0].actions[0])
        table.apply(actions[-1])
    return actions


def put_down(table: Table, over: list[float]) -> None:
    """Play until the box is let go at its place, and note its heights above the wall."""
    expert = LiberoExpert()
    for step in range(150):
        play(table, 1, expert, step)
        if abs(table.object[0] - 0.15) < 0.03:
            over.append(table.object[2])
        if table.closed == 0 and table.object[0] > 0.15:
            break
    assert table.closed == 0
    np.testing.assert_allclose(table.object, [0.3, 0, 0], atol=0.012)


def test_a_box_is_carried_over_what_stands_between_and_put_down() -> None:
    table, over = Table(), []
    put_down(table, over)
    assert min(over) > 0.15  # the wall's height


def test_a_hand_that_small_actions_do_not_move_gets_larger_ones() -> None:
    table = Table(friction=0.008)  # an error of 13 mm alone would leave it where it is
    put_down(table, [])


def test_a_contact_that_comes_and_goes_is_not_a_lost_object_and_one_that_stays_away_is() -> None:
    table, expert = Table(), LiberoExpert()
    first = next(step for step in range(100) if play(table, 1, expert, step) and table.object[2] > 0.1)
    table.contact = False
    assert all(action[6] == 1 for action in play(table, LOST, expert, first + 1))
    table.contact = True
    assert all(action[6] == 1 for action in play(table, 2, expert, first + 1 + LOST))
    table.contact = False
    assert play(table, LOST + 1, expert, first + 3 + LOST)[-1][6] == -1


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


def test_a_task_without_facts_of_its_goal_is_refused_by_name() -> None:
    seen = Observation({}, np.zeros(8, np.float32), "open the top drawer and put the bowl inside")
    with pytest.raises(SimulationError, match="task 'inside'.*one object.*closed drawer.*record.tasks"):
        LiberoExpert().act([seen], [EpisodeKey(0, "inside", 0)])
