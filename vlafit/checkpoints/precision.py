"""Round a policy's weights to bfloat16 for export, except those that the target keeps in float32."""

from collections.abc import Callable

import torch
from torch import Tensor

from vlafit.checkpoints.assign import replace_parameter
from vlafit.nn.deferred import Deferred, rounded
from vlafit.nn.policy import ParameterInfo, Policy
from vlafit.policies import family, family_name
from vlafit.tuning.inject import adapter_tensors, base_name

Precise = Callable[[ParameterInfo], bool]
"""Whether a program keeps a parameter in float32, in a policy of which the others are bfloat16."""


@torch.no_grad()
def round_weights(policy: Policy, precise: Precise) -> None:
    """Round, in place, what is to be bfloat16; the dtypes stay. Adapters and quantised weights stay, too."""
    for name, tensor in _narrow(policy, precise).items():
        if tensor.dtype == torch.float32 and isinstance(tensor, Deferred):
            replace_parameter(policy, name, rounded(tensor, torch.bfloat16))
        elif tensor.dtype == torch.float32:
            tensor.copy_(tensor.to(torch.bfloat16))


def cast(policy: Policy, precise: Precise) -> None:
    """Make bfloat16 of what is to be so; adapters stay as they are."""
    for name, tensor in _narrow(policy, precise).items():
        narrow = tensor.cast if isinstance(tensor, Deferred) else tensor.detach().to
        replace_parameter(policy, name, narrow(torch.bfloat16))


def dtype_name(policy: Policy) -> str:
    """Return what the config of another program calls the policy's dtype."""
    narrow = any(p.dtype == torch.bfloat16 for p in policy.parameters())
    return "bfloat16" if narrow else "float32"


def _narrow(policy: Policy, precise: Precise) -> dict[str, Tensor]:
    live, adapters = dict(policy.named_parameters()), adapter_tensors(policy)
    named = {base_name(name): name for name in live if name not in adapters}
    infos = family(family_name(policy)).build(policy.config, "meta").parts()  # without what is put in
    chosen = [named[info.name] for info in infos if not precise(info)]
    return {name: live[name] for name in chosen if live[name].is_floating_point()}
