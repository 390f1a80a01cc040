"""How LIBERO's scripted expert moves a drawer, a knob and a dish, without the simulator."""

import numpy as np
import pytest
from numpy.typing import NDArray

from vlafit.envs.experts_libero import LiberoExpert, motion
from vlafit.envs.experts_libero_parts import outward, plan_hold
from vlafit.envs.experts_libero_push import CLEAR, downward, plan_route
from vlafit.envs.libero_control import METRES, RADIANS
from vlafit.types import EpisodeKey, Observation

DOWN = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])  # the fingers close along y


def box(x: float, y: float, z: float, at: tuple[float, float, float]) -> NDArray[np.float64]:
    """Points of a box with these lengths around `at`."""
    sides = [np.linspace(-side / 2, side / 2, 7) for side in (x, y, z)]
    return np.stack(np.meshgrid(*sides), -1).reshape(-1, 3) + at


class Fixture:
    """A hand, and a part that it takes along while it holds it: along +y, or around the vertical."""

    def __init__(self, *, slides: bool) -> None:
        self.hand, self.rotation, self.slides = np.array([-0.2, 0.0, 1.1]), DOWN.copy(), slides
        bar = box(0.09, 0.016, 0.016, (0, -0.13, 1.0))  # of a drawer, before its front
        front = box(0.2, 0.01, 0.07, (0, -0.16, 1.0))
        ridge = box(0.09, 0.024, 0.03, (0.0, 0.0, 0.93))  # of a knob, over its disc
        disc = box(0.08, 0.08, 0.01, (0.0, 0.0, 0.91))
        self.shape = np.concatenate([bar, front] if slides else [ridge, disc])
        self.joint, self.closed, self.goal = 0.0, 0, ([-0.14, -0.16] if slides else [0.5, 2.1])
        self.axis = np.array([0.0, -1.0, 0.0]) if slides else np.array([0.0, 0.0, 1.0])

    def facts(self) -> dict[str, NDArray[np.float64]]:
        turned = _around(self.axis * self.joint)
        part = self.shape + self.axis * self.joint if self.slides else self.shape @ turned.T
        return {
            "part": part,
            "around": np.empty((0, 3)),
            "joint": np.array([self.joint]),
            "joint_goal": np.array(self.goal),
            "joint_axis": self.axis,
            "joint_anchor": np.zeros(3),
            "slides": np.array([float(self.slides)]),
            "held": np.array([float(self.closed > 3)]),
            "hand": self.hand.copy(),
            "hand_rotation": self.rotation.copy(),
            "fingers": np.zeros((2, 3)),
        }

    def apply(self, action: NDArray[np.float32]) -> None:
        assert np.abs(action).max() <= 1
        shift, turn = action[:3] * METRES, action[3:6] * RADIANS
        self.hand += shift
        self.rotation = _around(turn) @ self.rotation
        self.closed = self.closed + 1 if action[6] > 0 else 0
        if self.closed > 3:
            self.joint += float(shift @ self.axis) if self.slides else float(turn[2])
            self.joint = float(np.clip(self.joint, *sorted((0.0, self.goal[1]))))


def _around(turn: NDArray[np.float64]) -> NDArray[np.float64]:
    angle = float(np.linalg.norm(turn))
    x, y, z = turn / max(angle, 1e-12)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def play(fixture: Fixture, steps: int) -> list[NDArray[np.float32]]:
    expert, actions = LiberoExpert(), []
    for step in range(steps):
        seen = Observation({}, np.zeros(8, np.float32), "move the part", fixture.facts())
        actions.append(expert.act([seen], [EpisodeKey(0, "part", step)])[0].actions[0])
        fixture.apply(actions[-1])
    return actions


def test_a_drawer_is_held_at_its_bar_across_its_height_by_a_level_hand() -> None:
    facts = Fixture(slides=True).facts()
    point, rotation = plan_hold(facts)
    np.testing.assert_allclose(outward(facts), [0, 1, 0])  # where it opens to
    np.testing.assert_allclose(rotation[:, 2], [0, -1, 0], atol=1e-9)
    np.testing.assert_allclose(np.abs(rotation[:, 0]), [0, 0, 1], atol=1e-9)
    np.testing.assert_allclose(point, [0, -0.13, 1.0], atol=1e-9)
    np.testing.assert_allclose(np.linalg.det(rotation), 1)


def test_a_knob_is_held_from_above_across_its_ridge_at_the_nearer_end() -> None:
    point, rotation = plan_hold(Fixture(slides=False).facts())
    np.testing.assert_allclose(rotation, DOWN, atol=1e-9)
    assert point[0] < -0.02  # the hand comes from -x
    np.testing.assert_allclose(point[1], 0, atol=1e-9)


@pytest.mark.parametrize("slides", [True, False])
def test_a_part_is_moved_to_where_it_counts_and_then_let_go(slides: bool) -> None:
    fixture = Fixture(slides=slides)
    actions = play(fixture, 200)
    near, far = fixture.goal
    assert abs(near) < abs(fixture.joint) <= abs(far)
    assert actions[-1][6] == -1 and max(action[6] for action in actions) == 1
    assert np.linalg.norm(fixture.hand - fixture.facts()["part"], axis=1).min() > 0.05


def dish(at: tuple[float, float]) -> dict[str, NDArray[np.float64]]:
    angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    ring = np.stack([0.07 * np.cos(angles), 0.07 * np.sin(angles), 0.02 + 0 * angles], -1)
    there = np.array([*at, 0.0])
    return {
        "points": ring + there,
        "object": there,
        "place": np.array([0.0, 0.25, 0.0]),
        "room": np.array([0.04, 0.04]),
        "base": np.array([-0.6, 0.0, 0.0]),
        "around": np.empty((0, 3)),
        "grasped": np.zeros(1),
    }


def test_a_dish_goes_straight_into_its_place_where_nothing_is_in_the_way() -> None:
    (place,) = plan_route(dish((0.0, 0.0)))
    assert abs(place[0]) < 1e-9 and 0.22 < place[1] < 0.28


def test_a_dish_goes_around_what_stands_in_its_way_and_not_around_what_hangs_above() -> None:
    facts = dish((0.0, 0.0))
    facts["around"] = box(0.06, 0.03, 0.02, (-0.04, 0.11, 0.01))
    route = plan_route(facts)
    assert len(route) == 2
    ways = [np.linspace(begin, end, 50) for begin, end in zip([np.zeros(2), route[0]], route, strict=True)]
    away = np.concatenate(ways)[:, None] - facts["around"][:, :2]
    assert np.linalg.norm(away, axis=-1).min() > 0.07 - CLEAR
    facts["around"] += [0, 0, 0.2]
    assert len(plan_route(facts)) == 1


def test_fingers_stand_side_by_side_across_the_way_within_the_wrist_s_range() -> None:
    for way in ([0.0, 1.0], [-1.0, 0.0], [0.6, 0.8]):
        rotation = downward(np.array(way))
        assert abs(rotation[:2, 0] @ way) < 1e-9
        np.testing.assert_allclose(rotation[:, 2], [0, 0, -1])
        np.testing.assert_allclose(np.linalg.det(rotation), 1)
        assert rotation[0, 0] <= rotation[1, 0]  # towards -x or +y


def test_only_the_sentence_says_that_an_object_is_pushed() -> None:
    facts = dish((0.0, 0.0))
    said = {"push the plate": "push", "put the plate away": "place"}
    assert {text: motion(Observation({}, np.zeros(8, np.float32), text, facts)) for text in said} == said
