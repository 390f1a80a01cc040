"""Helpers for families: describe parameters, choose some of them, draw fresh weights."""

import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import nn

from vlafit.errors import ConfigError
from vlafit.nn.construct import allocate, construct, unfilled
from vlafit.nn.kinds import Kind
from vlafit.nn.policy import ParameterInfo, Policy

P = TypeVar("P", bound=Policy)
LAYER = re.compile(r"\.layers\.(\d+)\.")
RESIDUAL = ("o_proj", "down_proj", "out_proj", "fc2")  # lead back into the residual stream


def describe(policy: nn.Module, parts: Mapping[str, str], default: str) -> list[ParameterInfo]:
    """Describe every parameter, in order.

    `parts` maps the first words of names to parts ("vision" or "vision.layers"; the longest match counts);
    other parameters are of the part `default`. A layer is the number after `.layers.`. The kind is that of
    the module that holds the parameter: convolutions (depthwise ones apart), norms and embeddings by their
    class; linear layers are "attention" inside a module called `self_attn` or `cross_attn`, "mlp" inside one
    called `mlp`.
    """
    infos = []
    for name, _ in policy.named_parameters():
        fitting = [prefix for prefix in parts if name == prefix or name.startswith(f"{prefix}.")]
        part = parts[max(fitting, key=len)] if fitting else default
        layer = LAYER.search(f".{name}")
        infos.append((name, part, _kind(policy, name), int(layer[1]) if layer else None))
    depths: dict[str, int] = {}
    for _, part, _, layer in infos:
        depths[part] = max(depths.get(part, 0), 0 if layer is None else layer + 1)
    return [ParameterInfo(name, part, kind, layer, depths[part]) for name, part, kind, layer in infos]


def _kind(policy: nn.Module, name: str) -> Kind:
    path, _, _ = name.rpartition(".")
    module = policy.get_submodule(path)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm):
        return "norm"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "conv" if module.groups == 1 else "depthwise"
    words = name.split(".")
    if "self_attn" in words or "cross_attn" in words:
        return "attention"
    return "mlp" if "mlp" in words else "linear"


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor's values, to hash them."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


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
    policy: Policy, generator: torch.Generator, names: Sequence[str] | None, unit_norms: Sequence[str]
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
        parameter, leaf = parameters[info.name], info.name.split(".")
        is_weight = info.name.endswith(".weight")
        if info.kind == "norm" or not is_weight:
            parameter.fill_(1.0 if is_weight and info.part in unit_norms else 0.0)
            continue
        std = parameter.shape[1:].numel() ** -0.5
        if leaf[-2] in RESIDUAL:
            std *= (2 * max(info.layers, 1)) ** -0.5
        if leaf[-2] == "action_out_proj":
            std *= 0.1
        draw = torch.empty(parameter.shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
        parameter.copy_(draw)
    return [info.name for info in chosen]


def build_policy(
    make: Callable[[], P],
    init_weights: Callable[[P, torch.Generator], object],
    device: str | torch.device,
    generator: torch.Generator | None,
) -> P:
    """Build a policy: parameters without storage on ``"meta"``, else with fresh weights from `generator`.

    `make` constructs it and computes its buffers, `init_weights` fills every parameter. Without a generator,
    fresh weights are those of seed 0. Raises ConfigError naming parameters that are not filled, tensors that
    `make` does not compute, and what no checkpoint can restore; see `vlafit.nn.construct`.
    """
    policy = construct(make)
    if torch.device(device).type != "meta":
        allocate(policy, device)
        init_weights(policy, generator or torch.Generator().manual_seed(0))
        if names := unfilled(policy.named_parameters()):
            raise ConfigError(
                f"{type(policy).__name__}: init_weights leaves {', '.join(names)} without numbers"
            )
    return policy
