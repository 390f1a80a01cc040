"""What the families share: checks of batches and configs, choosing parameters, fresh weights."""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import cast

import torch
from torch import Tensor

from vlafit.errors import CodecError, ConfigError
from vlafit.nn.batch import Batch
from vlafit.nn.policy import Kind, Needs, ParameterInfo, Part, Policy


def check_batch(batch: Batch, needs: Needs) -> None:
    """Raise CodecError naming the first field of `batch` that is not what a policy `needs`."""
    b = batch.images.shape[0]
    n, length = batch.image_mask.shape[-1], batch.tokens.shape[-1]
    wanted: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("images", batch.images, (b, n, 3, needs.image_size, needs.image_size)),
        ("image_mask", batch.image_mask, (b, n)),
        ("tokens", batch.tokens, (b, length)),
        ("token_mask", batch.token_mask, (b, length)),
        ("state", batch.state, (b, needs.state_dim)),
        ("actions", batch.actions, (b, needs.chunk, needs.action_dim)),
        ("action_mask", batch.action_mask, (b, needs.chunk, needs.action_dim)),
    ]
    for name, value, shape in wanted:
        if value is not None and tuple(value.shape) != shape:
            raise CodecError(f"batch.{name} has shape {tuple(value.shape)}; this policy takes {shape}")
    if batch.images.device.type == "cpu" and length:
        low, high = int(batch.tokens.min()), int(batch.tokens.max())
        if low < 0 or high >= needs.vocabulary:
            raise CodecError(
                f"batch.tokens reach from {low} to {high}; this policy knows 0 to {needs.vocabulary - 1}:"
                " use the tokenizer that belongs to it"
            )


def require_positive(sections: Mapping[str, object]) -> None:
    """Raise ConfigError for a whole number below 1 among the fields of `sections` (prefix -> dataclass)."""
    for where, values in sections.items():
        for key, value in vars(values).items():
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise ConfigError(f"policy config: {where}{key} is {value}; it must be at least 1")


def require(*checks: tuple[bool, str]) -> None:
    """Raise ConfigError with the message of the first check that does not hold."""
    for holds, message in checks:
        if not holds:
            raise ConfigError(f"policy config: {message}")


def describe(name: str, layers: Mapping[str, int]) -> ParameterInfo:
    """Describe a parameter of a policy whose modules are named as in pi0; `layers` counts each part's."""
    head = name.split(".")[0]
    part = cast(Part, head if head in ("vision", "projector", "language", "expert") else "projections")
    found = re.search(r"\.layers\.(\d+)\.", name)
    layer = int(found[1]) if found else None
    depth = layers.get(part, 0)
    return ParameterInfo(name, part, _kind(name), layer, depth, _is_dead(name, layer, depth))


def select(infos: Sequence[ParameterInfo], names: Sequence[str] | None) -> list[ParameterInfo]:
    """Return the parameters in the parts or under the name patterns `names` (None: all), in order."""
    if names is None:
        return list(infos)
    for name in names:
        if not any(info.part == name or fnmatchcase(info.name, name) for info in infos):
            parts = ", ".join(sorted({info.part for info in infos}))
            raise ConfigError(f"{name!r} is no part of the policy ({parts}) and matches no parameter's name")
    return [i for i in infos if any(i.part == name or fnmatchcase(i.name, name) for name in names)]


@torch.no_grad()
def draw_weights(
    policy: Policy, generator: torch.Generator, names: Sequence[str] | None, unit_norms: Sequence[Part]
) -> list[str]:
    """Draw fresh weights, on the CPU and in the order of the parameters; return the names that were drawn.

    `names` limits it to parts (``"expert"``) and name patterns (``"action_*"``); one that matches nothing
    raises ConfigError. Matrices are normal with variance 1 / fan-in, less on the way back into the residual
    stream and at the action output. Norms start as the identity: their weights are one in the parts
    `unit_norms`, and zero elsewhere, where one is added (Gemma) or where adaptive norms start closed.
    """
    chosen = select(policy.parts(), names)
    parameters = dict(policy.named_parameters())
    for info in chosen:
        parameter, leaf = parameters[info.name], info.name.rsplit(".", 2)
        is_weight = info.name.endswith(".weight")
        if info.kind == "norm" or not is_weight:
            parameter.fill_(1.0 if is_weight and info.part in unit_norms else 0.0)
            continue
        std = parameter.shape[1:].numel() ** -0.5
        if leaf[-2] in ("o_proj", "down_proj", "out_proj", "fc2"):
            std *= (2 * info.layers) ** -0.5
        if leaf[-2] == "action_out_proj":
            std *= 0.1
        draw = torch.empty(parameter.shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
        parameter.copy_(draw)
    return [info.name for info in chosen]


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
