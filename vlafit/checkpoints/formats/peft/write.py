"""The adapters of a policy as one PEFT folder in another program's module names.

``PeftModel.from_pretrained(their policy, folder)`` then computes what ours does. The weights below the
adapters are not always those that training began with: projections were trained in full, PiSSA moved part of
a weight into its adapter, a quantised weight is rounded. So they are written beside the adapters, in `base/`,
as the target saves a whole checkpoint, and adapter_config.json names that folder.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from vlafit.checkpoints.formats.hf_transformers import names as transformers
from vlafit.checkpoints.formats.hf_transformers import write as transformers_export
from vlafit.checkpoints.formats.lerobot import names as lerobot
from vlafit.checkpoints.formats.native.adapters import PREFIX, TENSORS, is_stored, peft_name
from vlafit.nn.policy import Policy
from vlafit.policies.smolvla import SmolVLA
from vlafit.tuning import Plan
from vlafit.tuning.inject import Group, adapter_tensors, as_new, make_groups, peft_config

BASE = "base"  # folder of the weights below the adapters


@dataclass(frozen=True)
class Taken:
    """Adapters under another program's names: what a PEFT folder holds."""

    group: Group
    """Its layers are the target's modules."""
    tensors: dict[str, Tensor]
    """By peft's names in files."""


def refusals(policy: Policy, plan: Plan, target: str) -> list[str]:
    """Say why the adapters of `plan` cannot go to `target` as adapters; empty where they can."""
    if target == "openpi":
        return ["openpi's PyTorch code loads no adapters: add --merge"]
    groups = make_groups(plan.adapted)
    if len(groups) > 1:
        return [
            f"a PEFT folder holds one adapter, and these are {len(groups)} of different settings"
            f" ({', '.join(group.name for group in groups)}): add --merge"
        ]
    if target != "transformers":
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    theirs = dict(transformers_export.skeleton(policy.config).named_modules())
    names = _names(policy, target)
    odd = []
    for layer in groups[0].layers:
        module = policy.get_submodule(layer)
        ours = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if not _is_alike(ours, theirs.get(names(layer))):
            odd.append(layer)
    lost = [layer for layer in groups[0].layers if names(layer).startswith("embed_action_time.")]
    if lost:
        return [
            f"peft does not find the adapters of {', '.join(lost)} again when it loads them (names that "
            "begin with embed_action_time are renamed twice there): add --merge"
        ]
    if odd:
        return [f"transformers has no layer of the kind of {odd[0]} ({len(odd)} such): add --merge"]
    return []


def take(policy: Policy, plan: Plan, target: str) -> Taken:
    """Return the policy's adapters under the target's names; `refusals` must be empty."""
    (group,) = make_groups(plan.adapted)
    names = _names(policy, target)
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
    return Taken(renamed, tensors)


def write(folder: Path, taken: Taken, base: Path) -> None:
    """Write adapter_config.json and the adapters' tensors; `base` is where base/ will lie."""
    config = peft_config(taken.group)
    config.inference_mode = True
    config.base_model_name_or_path = str(base)
    config.save_pretrained(folder)
    save_file(taken.tensors, folder / TENSORS, metadata={"format": "pt"})


def _names(policy: Policy, target: str) -> Callable[[str], str]:
    """Return a function from our name of a layer to that of the target's module."""
    if target == "transformers":
        names = transformers.LIVE
    else:
        names = lerobot.SMOLVLA if isinstance(policy, SmolVLA) else lerobot.PI0
    return lambda layer: names.theirs(f"{layer}.weight").removesuffix(".weight")


def _is_alike(ours: nn.Module, theirs: nn.Module | None) -> bool:
    for kind in (nn.Linear, nn.Conv2d, nn.Embedding):
        if isinstance(ours, kind):
            return isinstance(theirs, kind) and theirs.weight.shape == _shape(ours)
    return False


def _shape(layer: nn.Module) -> tuple[int, ...]:
    """Return the shape of a layer's weight, also where its numbers are packed."""
    if isinstance(layer, nn.Linear):
        return (layer.out_features, layer.in_features)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return tuple(weight.shape)
