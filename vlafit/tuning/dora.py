"""DoRA without dense updates: the norm of W + sBA from its factors.

peft's layer builds the update BA, as large as W, in every forward pass and keeps it for backward: 1.4 times
LoRA's time, and more memory than full fine-tuning at small batches (measured). The row norms DoRA needs are

    ||w + s b A||^2 = ||w||^2 + 2 s b . (A w) + s^2 b (A A^T) b^T        (w, b: a row of W and of B)

which costs as much as a rank's worth of tokens. The norm is a constant in backward, as in the paper (section
4.3 of arXiv 2402.09353). Only linear layers are replaced: convolutions and embeddings are few, and keep
peft's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.dora import DoraEmbeddingLayer, DoraLinearLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn


class FactoredDoraLayer(DoraLinearLayer):
    """peft's magnitude vector for a linear layer, with the norm computed from the factors."""

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: nn.Module,
        lora_B: nn.Module,
        scaling: float,
        base_layer: nn.Module,
        base_result: Tensor | None = None,
        adapter_name: str = "default",
    ) -> Tensor:
        """Return the update of the base layer's output for `x` [..., in]; see peft's DoraLinearLayer."""
        weight = dequantize_module_weight(base_layer)
        norm = _row_norms(weight, lora_A.weight, lora_B.weight, scaling)  # type: ignore[arg-type]
        scale = (self.weight / norm).to(x.dtype)  # [out]
        if base_result is None:  # dropout: the adapter's x is not the base layer's
            base_result = F.linear(x, weight.to(x.dtype))
        elif base_layer.bias is not None:
            base_result = base_result - base_layer.bias  # type: ignore[operator]
        # Sum first, scale once: backward then keeps one output instead of two.
        both = torch.add(base_result, lora_B(lora_A(x)), alpha=scaling)
        return torch.addcmul(-base_result, scale, both)


@torch.no_grad()
def _row_norms(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return the norms of the rows of weight [out, in] + scaling * b [out, r] @ a [r, in], float32 [out]."""
    weight, a, b = weight.float(), a.float(), b.float()
    with torch.autocast(weight.device.type, enabled=False):
        square = torch.linalg.vector_norm(weight, dim=1).square_()
        square += 2 * scaling * (b * (weight @ a.T)).sum(1)
        square += scaling**2 * ((b @ (a @ a.T)) * b).sum(1)
    return square.clamp_min(torch.finfo(torch.float32).tiny).sqrt()


@torch.no_grad()
def begin(policy: nn.Module, name: str) -> None:
    """Replace the untrained DoRA linear layers of adapter `name` by factored ones.

    Magnitudes are set to the norms computed in float32, as in training, so that each layer is exactly the
    identity at the start, over bfloat16 weights too (peft rounds the norms to the weights' precision).
    """
    for module in policy.modules():
        layer: Any = module
        vectors: Any = getattr(module, "lora_magnitude_vector", None)
        if vectors is None or name not in vectors:
            continue
        original, scaling = vectors[name], layer.scaling[name]
        weight = dequantize_module_weight(layer.get_base_layer())
        if type(original) is DoraLinearLayer:
            vectors[name] = factored = FactoredDoraLayer(original.fan_in_fan_out)
            factored.weight = original.weight
            if not weight.is_meta:
                factored.weight.copy_(
                    _row_norms(weight, layer.lora_A[name].weight, layer.lora_B[name].weight, scaling)
                )
        elif type(original) is DoraEmbeddingLayer:
            a, b = layer.lora_embedding_A[name], layer.lora_embedding_B[name]  # [r, in], [out, r]
            update = original.get_lora_weight(a.T, b.T)
            original.weight.copy_(original.get_weight_norm(weight, update, scaling))
