"""Helpers that families share: checks of configs, what parameters are, ImageNet's normalisation."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vlafit.errors import ConfigError
from vlafit.nn.kinds import Kind
from vlafit.nn.parameters import select
from vlafit.nn.policy import ParameterInfo

__all__ = [
    "PIXEL_MEAN", "PIXEL_STD", "all_true_on_cpu", "describe", "imagenet_normalised", "multiple",
    "require", "require_positive", "select", "token_hits",
]  # fmt: skip

PARTS = {
    **{part: part for part in ("vision", "projector", "language", "expert")},
    "lm_head": "language",  # an output layer over the vocabulary, in every family
}
PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of images in [0, 1]


def imagenet_normalised(images: Tensor) -> Tensor:
    """Return images [..., 3, h, w] in [-1, 1] with ImageNet's mean and deviation."""
    mean, std = images.new_tensor(PIXEL_MEAN), images.new_tensor(PIXEL_STD)
    return ((images + 1) / 2 - mean[:, None, None]) / std[:, None, None]


def token_hits(logits: Tensor, targets: Tensor, counted: Tensor) -> tuple[Tensor, float]:
    """Return how many of the `counted` target tokens [b, m] are the likeliest by `logits` [b, m, v], and how
    many there are: a figure of `Policy.measures`.
    """
    return ((logits.argmax(-1) == targets) & counted).sum(), float(int(counted.sum()))


def require_positive(sections: Mapping[str, object], zero: Sequence[str] = ()) -> None:
    """Raise ConfigError for a whole number below 1 among the fields of `sections` (prefix -> dataclass).

    Fields named in `zero` may be 0.
    """
    for where, values in sections.items():
        for key, value in vars(values).items():
            least = 0 if key in zero else 1
            if isinstance(value, int) and not isinstance(value, bool) and value < least:
                raise ConfigError(f"policy config: {where}{key} is {value}; it must be at least {least}")


def require(*checks: tuple[bool, str]) -> None:
    """Raise ConfigError with the message of the first check that does not hold."""
    for holds, message in checks:
        if not holds:
            raise ConfigError(f"policy config: {message}")


def multiple(name: str, value: int, other: str, divisor: int) -> tuple[bool, str]:
    """Return the check that one field of a config is a multiple of another one, for `require`."""
    return value % divisor == 0, f"{name} {value} is no multiple of {other} {divisor}"


def describe(name: str, layers: Mapping[str, int]) -> ParameterInfo:
    """Describe a parameter of a policy whose modules are named as in pi0; `layers` counts each part's."""
    head = name.split(".")[0]
    part = PARTS.get(head, "projections")
    match = re.search(r"\.layers\.(\d+)\.", name)
    layer = int(match[1]) if match else None
    depth = layers.get(part, 0)
    return ParameterInfo(name, part, _kind(name), layer, depth, _is_dead(name, layer, depth))


def all_true_on_cpu(mask: Tensor) -> bool:
    """Whether `mask` is on the CPU and all true. A GPU would have to wait for the answer."""
    return mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(mask.all())


def _kind(name: str) -> Kind:
    if "patch_embedding" in name:
        return "conv"
    if "embed" in name:
        return "embedding"
    if "norm" in name:
        return "norm"
    if ".self_attn." in name:
        return "attention"
    return "mlp" if ".mlp." in name else "linear"


def _is_dead(name: str, layer: int | None, layers: int) -> bool:
    """Whether `name` is of the prefix's last layer past its keys and values, or its final norm."""
    if not name.startswith("language."):
        return False
    if layer is None:
        return name.startswith("language.norm.")
    live = ("input_layernorm.", "self_attn.k_proj.", "self_attn.v_proj.")
    return layer == layers - 1 and not any(word in name for word in live)
