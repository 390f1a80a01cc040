"""Quantise frozen base weights to 4 or 8 bits, with adapters on top (QLoRA, arXiv 2305.14314).

"nf4" is bitsandbytes' 4-bit NormalFloat with double quantisation, "int8" torchao's weight-only int8. Both run
on CPU and GPU. "fp8", torchao's weight-only float8, is for policies that only act (`weights_8bit.py`). Only
linear layers of attention and mlp are quantised: projections, norms, embeddings and the patch convolution are
small and compute in their own precision.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlafit.errors import LONGEST_QUOTE, StrategyError
from vlafit.nn.deferred import materialise
from vlafit.tuning.adapters import Quantise

Kept = Quantise | Literal["fp8"]
"""How a weight is kept; "" if it is not quantised."""
SMALLEST = torch.finfo(torch.float32).tiny * torch.finfo(torch.float8_e4m3fn).max
"""Largest weight of a row from which its float8 scale is a normal number, and not the 0 of a row of zeros."""


def quantise_layer(policy: nn.Module, name: str, how: Kept) -> None:
    """Replace the linear layer `name` by a quantised one.

    Raises StrategyError when the library for it is not installed, or the layer's device has no float8.
    """
    layer = policy.get_submodule(name)
    assert isinstance(layer, nn.Linear), name
    materialise(layer)
    if how == "nf4":
        policy.set_submodule(name, _nf4(layer))
    elif how == "int8":
        _int8(layer)
    elif how == "fp8":
        _fp8(layer)


def quantisation(layer: nn.Module) -> Kept:
    """Return how the weight of a linear layer is quantised; "" if it is not."""
    weight: Any = layer.weight
    if getattr(weight, "quant_state", None) is not None:
        return "nf4"
    if not type(weight).__module__.startswith("torchao"):
        return ""
    return "fp8" if type(weight).__name__ == "Float8Tensor" else "int8"


def dequantised(layer: nn.Module) -> Tensor | None:
    """Return the dequantised weight [out, in] of a layer; None if it is not quantised."""
    weight: Any = layer.weight
    match quantisation(layer):
        case "nf4":
            import bitsandbytes.functional as bnb

            return bnb.dequantize_4bit(weight.data, weight.quant_state)
        case "int8" | "fp8":
            return weight.dequantize()
    return None


def stored_bytes(tensor: Tensor) -> int:
    """Return the bytes that a tensor takes. torchao's quantised tensors report the size of the floats."""
    quantised: Any = tensor
    if type(tensor).__module__.startswith("torchao"):
        return sum(stored_bytes(getattr(quantised, name)) for name in quantised.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def is_rounded_from(layer: Any, weight: Tensor) -> bool:
    """Tell whether quantising `weight` [out, in] gives exactly the weight of the quantised `layer`."""
    current = dequantised(layer)
    assert current is not None
    if weight.shape != current.shape:
        return False
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(weight.detach().to(current.device, current.dtype))
    holder = nn.ModuleDict({"layer": plain})
    quantise_layer(holder, "layer", quantisation(layer))
    expected = dequantised(holder["layer"])
    return expected is not None and torch.equal(expected, current)


def _nf4(layer: nn.Linear) -> nn.Module:
    try:
        from bitsandbytes.nn.modules import Linear4bit, Params4bit
    except ImportError as error:
        raise StrategyError(
            f'quantise = "nf4" needs bitsandbytes: pip install "vlafit[quantise]" ({error})'
        ) from error
    quantised = Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=layer.weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    weight: Any = layer.weight.detach().clone()
    quantised.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", module=quantised)  # type: ignore[call-arg]
    if layer.bias is not None:
        quantised.bias = layer.bias
    # On some CPUs evaluation would repack the weight and compute in bfloat16, unlike training.
    quantised.support_avx512bf16_for_cpu = False
    return quantised.to(layer.weight.device)  # the move quantises it


def _int8(layer: nn.Linear) -> None:
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise _no_torchao("int8", error) from error
    bias = layer.bias
    # By default older versions also turn on TF32 for all products of the process.
    quantize_(layer, Int8WeightOnlyConfig(set_inductor_config=False))
    layer.bias = bias
    layer.weight.requires_grad_(False)


def _fp8(layer: nn.Linear) -> None:
    try:
        from torchao.quantization import Float8Tensor, PerRow
        from torchao.quantization.quantize_.common import KernelPreference
    except ImportError as error:
        raise _no_torchao("fp8", error) from error
    weight = layer.weight.detach()
    try:
        # What Float8WeightOnlyConfig does, but for the bound: a row of zeros would become NaN. The kernel
        # is named because the default takes another one where some package is installed.
        quantised = Float8Tensor.from_hp(
            weight, granularity=PerRow(), hp_value_lb=SMALLEST, kernel_preference=KernelPreference.TORCH
        )
        layer.weight = nn.Parameter(quantised, requires_grad=False)
    except (RuntimeError, TypeError) as error:  # torch's, where a device has no float8
        reason = str(error).splitlines()[0][:LONGEST_QUOTE]
        raise StrategyError(
            f'quantise = "fp8" cannot be used on {weight.device} ({reason}); take "int8"'
        ) from error


def _no_torchao(how: str, error: ImportError) -> StrategyError:
    return StrategyError(f'quantise = "{how}" needs torchao: pip install "vlafit[quantise]" ({error})')


def quantised_names(policy: nn.Module) -> set[str]:
    """Return the names of the quantised layers; adapted ones are below `base_layer`."""
    return {
        name
        for name, module in policy.named_modules()
        if isinstance(module, nn.Linear) and quantisation(module)
    }
