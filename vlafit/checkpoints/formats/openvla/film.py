"""The file in which OFT saves the towers with FiLM, whose linear layers hold LoRA there.

OFT's loader (experiments/robot/openvla_utils.py, `_apply_film_to_vla`) puts LoRA of rank `lora_rank`, 32
unless told otherwise, on the towers, wraps each block for FiLM, and loads the file strictly. So adapters in
the file are merged when it is read, and a file that is written has adapters that change nothing.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from vlafit.errors import WeightsError

TOWERS = "vision_backbone"
"""The module with both towers, which OFT saves with FiLM."""
ADAPTED = ("q", "kv", "qkv", "proj", "fc1", "fc2")
"""Layers of the towers that are "all-linear" for peft 0.11.1, OFT's: the patches' convolution, too."""
RANK, MOST_ALPHA = 32, 16  # lora_rank, and the most that lora_alpha is: vla-scripts/finetune.py
_FILM = re.compile(r"^vision_backbone\.\w+\.blocks\.\d+\.(scale|shift)\.")
_BLOCK = re.compile(r"^(vision_backbone\.\w+\.blocks\.\d+)\.(?!scale\.|shift\.)")
BASE, A, B = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"


def is_film(name: str) -> bool:
    """Whether a tensor of the towers belongs to FiLM, by its name in files."""
    return bool(_FILM.match(name))


def wrapped(name: str) -> str:
    """Return the name of a tower's tensor with the wrapper that FiLM puts around each block."""
    return _BLOCK.sub(r"\1.block.", name)


def written(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the towers' tensors as OFT's loader takes them: with its wrappers, and adapters whose B is 0.

    Their A is drawn as peft draws it, so that they could learn.
    """
    rng, made = torch.Generator().manual_seed(0), dict[str, Tensor]()
    for name, tensor in tensors.items():
        layer, _, kind = wrapped(name).rpartition(".")
        if layer.rpartition(".")[2] not in ADAPTED:
            made[f"{layer}.{kind}"] = tensor
            continue
        made[f"{layer}{BASE}{kind}"] = tensor
        if kind == "weight":
            rows, *columns = tensor.shape
            made[f"{layer}{A}"] = (torch.randn(RANK, *columns, generator=rng) / RANK).to(tensor.dtype)
            ones = [1] * (len(columns) - 1)  # of a convolution
            made[f"{layer}{B}"] = torch.zeros(rows, RANK, *ones, dtype=tensor.dtype)
    return made


def merged(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Return the tensors of such a file with its adapters merged as OFT merges them, W + alpha / r B A.

    Raises WeightsError naming a tensor of an adapter that is missing or does not fit.
    """
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith((A, B)):
            layer, _, _ = name.rpartition(".lora_")
            needed = (f"{layer}{BASE}weight", f"{layer}{A}", f"{layer}{B}")
            if missing := [one for one in needed if one not in tensors]:
                raise WeightsError(f"{where}: {name} is there without {missing[0]}; copy the file again")
        elif BASE not in name:
            made[name] = tensor
        else:
            layer, _, kind = name.rpartition(BASE)
            made[f"{layer}.{kind}"] = _sum(layer, tensor, tensors, where) if kind == "weight" else tensor
    return made


def _sum(layer: str, weight: Tensor, tensors: Mapping[str, Tensor], where: str) -> Tensor:
    """Return the weight of a layer with its adapter, if it has one."""
    a, b = tensors.get(f"{layer}{A}"), tensors.get(f"{layer}{B}")
    if a is None or b is None:
        return weight
    rank, ones = len(a), [1] * (weight.ndim - 2)
    if a.shape[1:] != weight.shape[1:] or list(b.shape) != [len(weight), rank, *ones]:
        shapes = " and ".join(str(tuple(one.shape)) for one in (a, b))
        raise WeightsError(
            f"{where}: the adapter of {layer} has the shapes {shapes}, which do not fit {tuple(weight.shape)}"
        )
    if not b.any():
        return weight
    change = (b.float().flatten(1) @ a.float().flatten(1)).view(weight.shape)
    return (weight.float() + min(rank, MOST_ALPHA) / rank * change).to(weight.dtype)
