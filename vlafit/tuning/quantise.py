"""Frozen base weights in 4 or 8 bits, to be adapted on top (QLoRA, arXiv 2305.14314).

"nf4" is bitsandbytes' 4-bit NormalFloat with double quantisation, "int8" torchao's weight-only int8. Both run
on CPU and GPU. Only the decoders' and tower's own linear layers are quantised: projections, norms, embeddings
and the patch convolution stay as they are, for they are small and compute in their own precision.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vlafit.errors import StrategyError
from vlafit.tuning.adapters import Quantise


def quantise_layer(policy: nn.Module, name: str, how: Quantise) -> None:
    """Exchange the linear layer `name` for a quantised one that holds the same weight, rounded.

    Raises StrategyError when the library for it is not installed.
    """
    layer = policy.get_submodule(name)
    assert isinstance(layer, nn.Linear), name
    if how == "nf4":
        policy.set_submodule(name, _nf4(layer))
    elif how == "int8":
        _int8(layer)


def quantisation(layer: nn.Module) -> Quantise:
    """Return how the weight of a linear layer is rounded; "" where it is not."""
    weight: Any = layer.weight
    if getattr(weight, "quant_state", None) is not None:
        return "nf4"
    return "int8" if type(weight).__module__.startswith("torchao") else ""


def dequantised(layer: nn.Module) -> Tensor | None:
    """Return the weight of a quantised layer as its floats [out, in]; None when it is not quantised."""
    weight: Any = layer.weight
    match quantisation(layer):
        case "nf4":
            import bitsandbytes.functional as bnb

            return bnb.dequantize_4bit(weight.data, weight.quant_state)
        case "int8":
            return weight.dequantize()
    return None


def stored_bytes(tensor: Tensor) -> int:
    """Return the bytes that a tensor takes; torchao's says of its rounded ones the size of the floats."""
    held: Any = tensor
    if type(tensor).__module__.startswith("torchao"):
        return sum(stored_bytes(getattr(held, name)) for name in held.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def is_rounded_from(layer: Any, weight: Tensor) -> bool:
    """Tell whether the quantised `layer` holds exactly what rounding `weight` [out, in] gives."""
    held = dequantised(layer)
    assert held is not None
    if weight.shape != held.shape:
        return False
    again = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    again.weight = nn.Parameter(weight.detach().to(held.device, held.dtype))
    holder = nn.ModuleDict({"layer": again})
    quantise_layer(holder, "layer", quantisation(layer))
    made = dequantised(holder["layer"])
    return made is not None and torch.equal(made, held)


def _nf4(layer: nn.Linear) -> nn.Module:
    try:
        from bitsandbytes.nn.modules import Linear4bit, Params4bit
    except ImportError as error:
        raise StrategyError(
            f'quantise = "nf4" needs bitsandbytes: pip install "vlafit[quantise]" ({error})'
        ) from error
    made = Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=layer.weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    weight: Any = layer.weight.detach().clone()
    made.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", module=made)  # type: ignore[call-arg]
    if layer.bias is not None:
        made.bias = layer.bias
    # On some CPUs evaluation would repack the weight and compute in bfloat16: other numbers than in training.
    made.support_avx512bf16_for_cpu = False
    return made.to(layer.weight.device)  # where it is quantised


def _int8(layer: nn.Linear) -> None:
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise StrategyError(
            f'quantise = "int8" needs torchao: pip install "vlafit[quantise]" ({error})'
        ) from error
    bias = layer.bias
    quantize_(layer, Int8WeightOnlyConfig())
    layer.bias = bias
    layer.weight.requires_grad_(False)


def quantised_names(policy: nn.Module) -> set[str]:
    """Return the names of the quantised layers, below `base_layer` where they are adapted."""
    return {
        name
        for name, module in policy.named_modules()
        if isinstance(module, nn.Linear) and quantisation(module)
    }
