"""Write the adapters of a policy as one PEFT folder in another program's module names.

``PeftModel.from_pretrained(their policy, folder)`` then computes what the vlafit policy does. The weights
below the adapters are not always those that training began with: projections were trained in full, PiSSA
moved part of a weight into its adapter, a quantised weight is rounded. So they are written beside the
adapters, in `base/`, as the target saves a whole checkpoint, and adapter_config.json names that folder.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from vlafit.checkpoints.formats.base import AdapterSupport
from vlafit.checkpoints.formats.native.adapters import PREFIX, TENSORS, is_stored, peft_name
from vlafit.checkpoints.name_map import NameMap
from vlafit.nn.policy import Policy
from vlafit.policies import family_name
from vlafit.tuning import Plan
from vlafit.tuning.inject import Group, adapter_tensors, as_new, make_groups, peft_config, save_config

BASE = "base"  # folder of the weights below the adapters


@dataclass(frozen=True)
class ExportedAdapters:
    """Adapters under another program's names: what a PEFT folder holds."""

    group: Group
    """Its layers are the target's modules."""
    tensors: dict[str, Tensor]
    """By peft's names in files."""


def refusals(policy: Policy, plan: Plan, support: AdapterSupport | None, program: str) -> list[str]:
    """Say why the adapters of `plan` cannot go to a program as adapters; empty where they can."""
    if support is None or support.names(family_name(policy)) is None:
        return [f"{program} loads no adapters of this family: add --merge"]
    groups = make_groups(plan.adapted)
    if len(groups) > 1:
        return [
            f"a PEFT folder holds one adapter, and these are {len(groups)} of different settings"
            f" ({', '.join(group.name for group in groups)}): add --merge"
        ]
    return support.refusals(policy, list(groups[0].layers))


def take(policy: Policy, plan: Plan, map: NameMap) -> ExportedAdapters:
    """Return the policy's adapters under the program's names; `refusals` must be empty."""
    (group,) = make_groups(plan.adapted)

    def names(layer: str) -> str:
        return map.file_name(f"{layer}.weight").removesuffix(".weight")

    # What PiSSA took out of a weight is not in base/ either: over it, the adapter is plain LoRA.
    group = as_new(group)
    renamed = replace(group, layers={names(layer): a for layer, a in group.layers.items()})
    live = dict(policy.named_parameters())
    tensors = {}
    for name, weight in adapter_tensors(policy).items():
        if is_stored(name):
            layer = weight.removesuffix(".weight")
            key = peft_name(names(layer) + name[len(layer) :], group.name)
            tensors[PREFIX + key] = live[name].detach().cpu().contiguous()
    return ExportedAdapters(renamed, tensors)


def write(folder: Path, exported: ExportedAdapters, base: Path) -> None:
    """Write adapter_config.json and the adapters' tensors; `base` is where base/ will lie."""
    config = peft_config(exported.group)
    config.inference_mode = True
    config.base_model_name_or_path = str(base)
    save_config(config, folder)
    save_file(exported.tensors, folder / TENSORS, metadata={"format": "pt"})
