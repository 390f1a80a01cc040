"""Every test of `vlafit data check`: what it finds, and what a dataset must have for it to run.

A test that cannot run says so, because a dataset in which nothing was looked for is no clean one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

NAMED = 5  # cameras, dimensions or episodes that a line names


@dataclass(frozen=True)
class Requirement:
    """What a test finds and needs."""

    kinds: tuple[str, ...]
    """The kinds of its findings."""
    needs: str = ""
    """What it needs; empty if it always runs."""


DRIVEN = (
    "4 episodes of at least 36 steps in which this action drives a dimension of the state: a correlation of "
    "0.6 (scale, offset and noise 0.9) and above what unrelated motion as smooth reaches by chance, and "
    "in most one sign and one delay (played_backwards: not 0)"
)
TESTS: Mapping[str, Requirement] = MappingProxyType(
    {
        # what files and card declare
        "repeated_names": Requirement(("repeated_names",), "names of state and action dimensions"),
        "shared_keys": Requirement(("shared_keys",)),
        "splits": Requirement(("splits",)),
        "unnamed_files": Requirement(("unnamed_files",)),
        "form": Requirement(("form",), "poses, grippers or angles in the card"),
        "stale_statistics": Requirement(("stale_statistics",), "statistics of all rows in the files"),
        "placeholder_task": Requirement(("placeholder_task",)),
        "failed_episodes": Requirement(("failed_episodes",), "success in the files of a local dataset"),
        # states and actions
        "not_finite": Requirement(("not_finite",)),
        "zero_rows": Requirement(("zero_rows",)),
        "outside_limits": Requirement(("outside_limits",), "low and high of state and action in the card"),
        "duplicate_episode": Requirement(("duplicate_episode",), "2 episodes"),
        "spike": Requirement(("spike",), "101 steps in all episodes together"),
        "action_equals_state": Requirement(
            ("action_equals_state",), "dimensions of state and action that change 3 times in an episode"
        ),
        "jump": Requirement(("jump",), "4 episodes, and a dimension that moves in most of them"),
        "repeated_rows": Requirement(("repeated_rows",), "4 episodes in which the state moves"),
        "dead_dimension": Requirement(("dead_dimension",), DRIVEN),
        "action_sign": Requirement(("action_sign",), DRIVEN),
        "action_lag": Requirement(("action_lag",), DRIVEN),
        "played_backwards": Requirement(("played_backwards",), DRIVEN),
        "scale": Requirement(("scale", "offset", "noisy"), DRIVEN),
        # frames
        "channel_order_beside": Requirement(
            ("channel_order",), "a video beside the files that shows the frames once more"
        ),
        "unreadable_frames": Requirement(("unreadable_frames",), "frames"),
        "black_frames": Requirement(("black_frames", "dark_frames"), "frames"),
        "frozen_frames": Requirement(("frozen_frames",), "a state and an image that move"),
        "frames_out_of_order": Requirement(
            ("frames_out_of_order",), "4 episodes of 24 frames in which the image moves smoothly"
        ),
        "video_shift": Requirement(
            ("video_shift", "video_mismatch"),
            "episodes of at least 36 steps: 4 in which the image changes as the state moves, or 6 of one "
            "scene in which frames predict the state",
        ),
        "orientation": Requirement(
            ("channel_order", "upside_down", "flipped_vertically", "flipped_horizontally"),
            "4 episodes whose mean images are alike, and look otherwise when turned, mirrored or BGR",
        ),
        "cameras_swapped": Requirement(
            ("cameras_swapped",), "4 episodes, and 2 cameras whose mean images are unlike"
        ),
        "same_cameras": Requirement(("duplicate_cameras",), "2 cameras with images that change"),
        "looks": Requirement(("looks_different", "cut", "blurred"), "4 episodes of one sentence"),
        "repeated_frames": Requirement(
            ("repeated_frames",), "4 episodes of one sentence, with a state and an image that move"
        ),
        "duplicate_frames": Requirement(("duplicate_frames",), "2 episodes with images that change"),
    }
)


@dataclass(frozen=True)
class NotTested:
    """A test that could not run, or not on everything."""

    test: str
    """Its name in TESTS."""
    finds: tuple[str, ...]
    """The kinds of findings that it would have made."""
    on: tuple[str, ...]
    """The cameras, dimensions or episodes on which it did not run; empty: it did not run at all."""
    reason: str
    """The measurement that forbids it."""
    needs: str
    """What it would need."""

    @property
    def where(self) -> str:
        """What it did not run on, shortened."""
        more = f" and {len(self.on) - NAMED} more" if len(self.on) > NAMED else ""
        return ", ".join(self.on[:NAMED]) + more


def together(tests: Sequence[NotTested]) -> list[tuple[str, NotTested]]:
    """Return tests of one reason as one, each with the names of those that it stands for."""
    groups: dict[tuple[object, ...], list[NotTested]] = {}
    for test in tests:
        groups.setdefault((test.on, test.reason, test.needs), []).append(test)
    return [(", ".join(dict.fromkeys(test.test for test in some)), some[0]) for some in groups.values()]


class Untested:
    """Collects the tests that could not run."""

    def __init__(self) -> None:
        self._on: dict[tuple[str, str], list[str]] = {}

    def add(self, test: str, reason: str, on: str = "") -> None:
        """Note that a test of TESTS did not run `on` something, or not at all."""
        self._on.setdefault((TESTS[test] and test, reason), []).append(on)

    def listed(self) -> tuple[NotTested, ...]:
        """Return the tests that did not run, in the order of TESTS, those of one reason together."""
        made = []
        order = list(TESTS)
        for (test, reason), where in sorted(self._on.items(), key=lambda item: order.index(item[0][0])):
            on = () if "" in where else tuple(dict.fromkeys(where))
            made.append(NotTested(test, TESTS[test].kinds, on, reason, TESTS[test].needs))
        return tuple(made)
