"""Draw parameters of a policy anew that a checkpoint does not hold, or is not to give."""

from collections.abc import Sequence

import torch

from vlafit.checkpoints.assign import DTYPES, Dtype, replace_parameter, stored_as
from vlafit.checkpoints.resize import selected
from vlafit.errors import ConfigError
from vlafit.nn.construct import unfilled
from vlafit.nn.policy import Policy
from vlafit.policies import family


def draw_fresh(
    policy: Policy,
    family_name: str,
    fresh: Sequence[str],
    dtype: Dtype,
    device: str | torch.device,
    generator: torch.Generator | None,
) -> list[str]:
    """Draw the parameters named by `fresh` on the CPU, move them to `device`, and return their names."""
    names = selected(policy, fresh)
    if not names:
        return names
    for info in policy.parts():
        if info.name in names:
            shape = policy.get_parameter(info.name).shape
            bare = torch.full(shape, torch.nan, dtype=stored_as(info, DTYPES[dtype]))
            replace_parameter(policy, info.name, bare)
    family(family_name).init_weights(policy, generator or torch.Generator().manual_seed(0), names)
    if empty := unfilled((name, policy.get_parameter(name)) for name in names):
        raise ConfigError(f"policy family {family_name!r}: init_weights does not fill {', '.join(empty)}")
    for name in names:
        replace_parameter(policy, name, policy.get_parameter(name).detach().to(device))
    return names
