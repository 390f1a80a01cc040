"""X-VLA's action spaces: what each channel of an action means to the loss, the inputs and the output.

The channels, weights and rules are those of LeRobot 0.6.1 and of the authors' code.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

SpaceName = Literal["ee6d", "agibot_ee6d", "joint", "auto", "franka_joint7", "so101_bimanual"]


@dataclass(frozen=True)
class Term:
    """A term of the loss: the mean over some channels, times a weight."""

    channels: tuple[int, ...]
    weight: float
    is_logit: bool = False
    """True: the channels are logits, and the term is their cross entropy with the action (0 or 1); False: the
    squared error."""


@dataclass(frozen=True)
class ActionSpace:
    """The meaning of an action's channels."""

    width: int
    """Channels of an action in the policy; 0: any."""
    terms: Mapping[str, Term]
    grippers: tuple[int, ...] = ()
    """Channels that the policy does not see, neither in the state nor in the noisy action, and whose outputs
    are logits when acting."""


def _range(low: int, high: int) -> tuple[int, ...]:
    return tuple(range(low, high))


def _ee6d(gripper: Term, grippers: tuple[int, ...]) -> ActionSpace:
    """Return two arms of xyz, rotation (two columns of the matrix) and gripper each."""
    terms = {
        "xyz_left": Term(_range(0, 3), 500.0),
        "xyz_right": Term(_range(10, 13), 500.0),
        "rotation_left": Term(_range(3, 9), 10.0),
        "rotation_right": Term(_range(13, 19), 10.0),
        "gripper": gripper,
    }
    return ActionSpace(20, terms, grippers)


SPACES: Mapping[SpaceName, ActionSpace] = {
    "ee6d": _ee6d(Term((9, 19), 1.0, is_logit=True), (9, 19)),
    "agibot_ee6d": _ee6d(Term((9, 19), 10.0), ()),
    "joint": ActionSpace(
        14,
        {
            "joints": Term((*_range(0, 6), *_range(7, 13)), 1.0),
            "gripper": Term((6, 13), 0.1, is_logit=True),
        },
        (6, 13),
    ),
    "franka_joint7": ActionSpace(20, {"joints": Term(_range(0, 7), 1.0)}),
    "so101_bimanual": ActionSpace(
        20,
        {
            "joints": Term(_range(0, 12), 1.0),
            "gripper": Term((5, 11), 1.0),
            "left_arm": Term(_range(0, 6), 1.0),
            "right_arm": Term(_range(6, 12), 1.0),
        },
        (5, 11),
    ),
}
"""The spaces with fixed channels; "auto" is made for a robot, see `space_of`."""


def space_of(name: SpaceName, action_dim: int, real_dim: int) -> ActionSpace:
    """Return an action space; "auto" is the squared error of the first `real_dim` channels (0: all)."""
    if name == "auto":
        return ActionSpace(0, {"joints": Term(_range(0, real_dim or action_dim), 1.0)})
    return SPACES[name]
