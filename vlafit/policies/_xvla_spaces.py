"""X-VLA's action spaces: what each channel of an action means to the loss, the inputs and the output.

The channels, weights and rules are those of LeRobot 0.6.1 and of the authors' code.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlafit.errors import CodecError
from vlafit.nn.activations import sigmoid
from vlafit.nn.policy import ActionLayout

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


_HANDS = "of one hand or two, each 3 of position, 6 of rotation (two columns) and a gripper of 0 or 1"
LAYOUTS: Mapping[SpaceName, tuple[str, tuple[int, ...], bool]] = {
    "ee6d": (_HANDS, (10, 20), True),
    "agibot_ee6d": (_HANDS, (10, 20), True),
    "joint": ("of one arm or two, each 6 joints and a gripper of 0 or 1", (7, 14), False),
    "franka_joint7": ("7 joints", (7,), False),
    "so101_bimanual": ("of one arm or two, each 5 joints and a gripper", (6, 12), False),
}
"""What the channels of a space are, how many a robot may have, and whether they are poses."""
REMEDY = 'policy.config.action_space = "auto" with data.normalisation = "mean_std"'


def layout_of(name: SpaceName) -> ActionLayout | None:
    """Return what an action's channels must be; None for "auto", which takes any."""
    if name == "auto":
        return None
    text, counts, poses = LAYOUTS[name]
    return ActionLayout(name, text, counts, poses, REMEDY)


def space_of(name: SpaceName, action_dim: int, real_dim: int) -> ActionSpace:
    """Return an action space; "auto" is the squared error of the first `real_dim` channels (0: all)."""
    if name == "auto":
        return ActionSpace(0, {"joints": Term(_range(0, real_dim or action_dim), 1.0)})
    return SPACES[name]


def error_sums(
    space: ActionSpace, predicted: Tensor, actions: Tensor, mask: Tensor | None
) -> dict[str, Tensor]:
    """Return the sum of each term of a space's loss; `predicted`, `actions` and `mask` are [..., a]."""
    sums = {}
    for name, term in space.terms.items():
        channels = list(term.channels)
        answer, wanted = predicted[..., channels], actions[..., channels]
        if term.is_logit:
            error = F.binary_cross_entropy_with_logits(answer, wanted, reduction="none")
        else:
            error = (answer - wanted).square()
        sums[name] = (error if mask is None else torch.where(mask[..., channels], error, 0.0)).sum()
    return sums


def require_probabilities(space: ActionSpace, actions: Tensor, mask: Tensor) -> None:
    """Raise CodecError for an action outside [0, 1] whose term is a cross entropy."""
    for channel in (c for term in space.terms.values() if term.is_logit for c in term.channels):
        values = actions[..., channel][mask[..., channel]]
        if values.numel() and not bool(((values >= 0) & (values <= 1)).all()):
            raise CodecError(
                f"batch.actions: dimension {channel} is a gripper, whose loss takes values from 0 to 1, and "
                f"reaches from {values.min():.3g} to {values.max():.3g}: the data must hold 0 and 1 there, "
                'and a codec must not normalise it (data.normalisation = "identity")'
            )


def hidden(space: ActionSpace, x: Tensor) -> Tensor:
    """Return a state or noisy action `x` [..., channels] with the channels 0 that the policy does not see."""
    if not space.grippers:
        return x
    kept = torch.ones(x.shape[-1], dtype=x.dtype)
    kept[list(space.grippers)] = 0.0
    return x * kept.to(x.device)


def outputs(space: ActionSpace, actions: Tensor) -> Tensor:
    """Return predicted `actions` [..., a] with probabilities where the space has logits."""
    if not space.grippers:
        return actions
    channels = list(space.grippers)
    actions = actions.clone()
    actions[..., channels] = sigmoid(actions[..., channels])
    return actions
