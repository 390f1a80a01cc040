"""A PEFT folder of adapters on another program's policy: the way back of `peft_export`, exactly or an error.

adapter_config.json says which modules carry an adapter, and of which kind; its names are the other program's.
Every module that it names must exist, every tensor beside it must find its place, and a setting that we do
not repeat is refused by name. Such adapters become rules of a plan, as if they had been put in here.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlafit import tuning
from vlafit.checkpoints import locate as hub
from vlafit.checkpoints.assign import open_tensors
from vlafit.checkpoints.formats.hf_transformers import names as transformers
from vlafit.checkpoints.formats.lerobot import names as lerobot
from vlafit.checkpoints.formats.lerobot.read_processors import PRE
from vlafit.checkpoints.formats.native import read as native
from vlafit.checkpoints.formats.native.adapters import CONFIG, PREFIX, TENSORS, is_stored, peft_name
from vlafit.checkpoints.formats.openpi import names as openpi
from vlafit.checkpoints.formats.peft.adapter_config import reader, require_repeated
from vlafit.checkpoints.formats.peft.write import BASE
from vlafit.checkpoints.name_map import NameMap
from vlafit.checkpoints.opened import Found
from vlafit.errors import ConfigError, StrategyError, WeightsError
from vlafit.nn.policy import Policy
from vlafit.policies.smolvla import SmolVLAConfig
from vlafit.tuning import Plan
from vlafit.tuning.inject import (
    adapter_shapes,
    adapter_tensors,
    group_of,
    layer_kind,
    make_groups,
)

DECIDING = (  # keys of LeRobot's config.json that decide what a policy computes
    "type",
    "chunk_size",
    "tokenizer_max_length",
    "max_state_dim",
    "max_action_dim",
    "paligemma_variant",
    "action_expert_variant",
    "image_resolution",
    "resize_imgs_with_padding",
    "attention_mode",
    "self_attn_every_n_layers",
    "num_vlm_layers",
    "num_expert_layers",
    "expert_width_multiplier",
)


@dataclass(frozen=True)
class Adapters:
    """A PEFT folder, its headers read."""

    folder: Path
    said: Mapping[str, Any]
    """adapter_config.json."""
    tensors: Mapping[str, Tensor]
    """By their names in the file, what peft puts before each left out."""
    base: Path
    names: NameMap | None = None
    """Ours and those of the program; known with the base."""
    saved: tuple[str, ...] = ()
    """Our names of the weights below the adapters that lie beside them."""


def recognise(path: Path) -> bool:
    """Whether `path` is a PEFT folder."""
    return (path / CONFIG).is_file()


def open_folder(folder: Path, base: str | Path | None) -> Adapters:
    """Read the headers of a PEFT folder and find its base: inside it, where it says, or where the user does.

    Raises WeightsError where either is missing or damaged.
    """
    above = folder.resolve().parents[1]
    if native.recognise(above):
        raise WeightsError(f"{folder}: the adapters of the checkpoint {above}, and not all of it: load that")
    path = folder / CONFIG
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(said, dict) or not isinstance(said.get("peft_type"), str):
        raise WeightsError(f"{path}: not an adapter_config.json of peft: it has no peft_type")
    if not (folder / TENSORS).is_file():
        raise WeightsError(
            f"{folder}: there is no {TENSORS} beside {CONFIG}; a pickle is not opened: convert it with"
            f" vlafit convert-pickle FILE --out {folder / TENSORS}"
        )
    stored = open_tensors([folder / TENSORS])
    odd = [name for name in stored if not name.startswith(PREFIX)]
    if odd:
        raise WeightsError(f"{folder / TENSORS}: not peft's names, which begin with {PREFIX!r}: {odd[:3]}")
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in stored.items()}
    return Adapters(folder, said, tensors, _base_of(folder, said, base))


def _base_of(folder: Path, said: Mapping[str, Any], given: str | Path | None) -> Path:
    inside = folder / BASE
    if inside.is_dir():
        if given is not None:
            raise WeightsError(f"{folder}: holds what its adapters sit on ({BASE}/); it takes no base")
        return inside
    told = said.get("base_model_name_or_path") if given is None else given
    if not told:
        raise WeightsError(f"{folder}: {CONFIG} names no base; say where it is: base=...")
    revision = said.get("revision")
    if given is None and revision and hub.parse(str(told)) == (str(told), None):
        told = f"{told}@{revision}"
    try:
        place = hub.place(told).path
    except (ConfigError, WeightsError) as error:
        raise WeightsError(
            f"{folder}: its adapters sit on {str(told)!r}, which cannot be opened ({error}); say where it is:"
            " base=..."
        ) from error
    if native.recognise(place) or recognise(place):
        raise WeightsError(
            f"{folder}: its base {place} is no plain checkpoint of another program: adapters on one of ours"
            " are saved, and loaded, as a checkpoint of ours"
        )
    return place


def put_on(found: Found, adapters: Adapters) -> Found:
    """Return the base `found` with what lies beside the adapters; they themselves wait for the policy.

    Raises WeightsError where they cannot be of this base.
    """
    forms = {
        lerobot.FORM: lerobot.PI0,
        transformers.SAVED.form: transformers.LIVE,
        openpi.NAMES.form: openpi.NAMES,
    }
    if found.form not in forms:
        raise WeightsError(f"{adapters.folder}: adapters on a checkpoint of {found.form} are not known here")
    is_smolvla = isinstance(found.config, SmolVLAConfig)
    names = lerobot.SMOLVLA if is_smolvla else forms[found.form]
    own = _saved(adapters, names, found.translated.weights)
    folder = adapters.folder
    if found.form == lerobot.FORM:
        _require_same_policy(folder, adapters.base)
    here = found.processors is not None and (folder / PRE).is_file()
    adapters = replace(adapters, names=names, saved=tuple(own))
    return replace(
        found,
        path=str(folder),
        translated=replace(found.translated, weights={**found.translated.weights, **own}),
        processors=folder if here else found.processors,
        adapters=adapters,
        notes=(*found.notes, f"adapters of peft ({len(adapters.tensors)} tensors) on {adapters.base}"),
    )


def _saved(adapters: Adapters, names: NameMap, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights in full that lie beside the adapters, by our names."""
    modules = adapters.said.get("modules_to_save") or ()
    found = {}
    for name, tensor in adapters.tensors.items():
        module = name.rpartition(".")[0]
        if any(module == one or module.endswith(f".{one}") for one in modules):
            found[names.ours(name)] = tensor
    odd = [name for name in found if name not in weights]
    if odd:
        raise WeightsError(f"{adapters.folder}: modules_to_save are not of its base: {odd[:3]}")
    return found


def _require_same_policy(folder: Path, base: Path) -> None:
    """Raise WeightsError where LeRobot's config.json beside adapters is of another policy than the base's."""
    here, there = lerobot.describe(folder), lerobot.describe(base)
    if here is None or there is None:
        return
    odd = [key for key in DECIDING if here.values.get(key) != there.values.get(key)]
    if odd:
        raise WeightsError(
            f"{here.path}: {odd[0]} is {here.values.get(odd[0])!r}, and {there.values.get(odd[0])!r} in"
            f" {there.path}: the adapters are not of this base"
        )


# ------------------------------------------------------------------------------------------------- the policy


def plan_of(policy: Policy, adapters: Adapters) -> Plan:
    """Return the adapters as a plan for the bare policy, which may be on the meta device.

    Raises WeightsError naming modules that do not exist, settings that we do not repeat, and every tensor
    that is missing, surplus or misshapen.
    """
    path = adapters.folder / CONFIG
    theirs = _layers(policy, adapters)
    dead = {info.name for info in policy.parts() if info.dead}
    chosen = _targets(theirs, adapters.said, path)
    rules = _rules([layer for layer in chosen if f"{layer}.weight" not in dead], theirs, adapters)
    try:
        plan = tuning.preview(policy, tuning.parse(rules, name="peft", where=str(path)))
    except StrategyError as error:
        raise WeightsError(f"{path}: these adapters cannot be put into the policy: {error}") from error
    groups = make_groups(plan.adapted)
    for group in groups:
        require_repeated(group, theirs, adapters.said, path)
    _require_tensors(policy, plan, adapters)
    return plan


@torch.no_grad()
def attach(policy: Policy, adapters: Adapters) -> Plan:
    """Put the adapters into the filled policy; return their plan. Raises as `plan_of`, and for NaN."""
    plan = plan_of(policy, adapters)
    theirs = _layers(policy, adapters)
    tuning.restore(policy, plan)
    live = dict(policy.named_parameters())
    broken = []
    for name in adapter_tensors(policy):
        if not is_stored(name):
            continue
        value = adapters.tensors[_key(name, theirs)]
        if torch.isfinite(value).all():
            live[name].copy_(value)
        else:
            broken.append(name)
    if broken:
        raise WeightsError(f"{adapters.folder}: adapters are not finite: {', '.join(broken)}")
    return plan


def _layers(policy: Policy, adapters: Adapters) -> dict[str, str]:
    """Return, for every layer of the policy that could carry an adapter, the other program's module."""
    assert adapters.names is not None
    weights = [name for name, _ in policy.named_parameters() if layer_kind(policy, name)]
    return {
        name.removesuffix(".weight"): adapters.names.theirs(name).removesuffix(".weight") for name in weights
    }


def _targets(theirs: Mapping[str, str], said: Mapping[str, Any], path: Path) -> list[str]:
    """Return our layers that target_modules names, as peft matches it."""
    target = said.get("target_modules")
    if isinstance(target, str):
        found = [layer for layer, module in theirs.items() if re.fullmatch(target, module)]
        if not found:
            raise WeightsError(f"{path}: no module of the base matches target_modules {target!r}")
        return found
    if not isinstance(target, list) or not target:
        raise WeightsError(f"{path}: target_modules must be a list of modules or a pattern, not {target!r}")
    lost = [t for t in target if not any(m == t or m.endswith(f".{t}") for m in theirs.values())]
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise WeightsError(
            f"{path}: target_modules that the base has not, or that carry no adapter here:"
            f" {', '.join(map(str, lost[:3]))}{more}"
        )
    exact = set(target)
    return [
        layer
        for layer, module in theirs.items()
        if module in exact or any(module.endswith(f".{t}") for t in target)
    ]


def _rules(layers: Sequence[str], theirs: Mapping[str, str], adapters: Adapters) -> list[dict[str, Any]]:
    """Return the rules that put these adapters in: one a setting, and one for the weights beside them."""
    settings: dict[str, tuple[dict[str, Any], list[str]]] = {}
    read = reader(adapters.said, adapters.folder / CONFIG)
    for layer in layers:
        options = read(theirs[layer])
        settings.setdefault(repr(options), (options, []))[1].append(f"{layer}.weight")
    rules = [{"select": {"pattern": names}, **options} for options, names in settings.values()]
    if adapters.saved:
        rules.append({"select": {"pattern": list(adapters.saved)}, "mode": "full"})
    return [*rules, {"mode": "frozen"}]


def _key(name: str, theirs: Mapping[str, str]) -> str:
    """Return the name in the file for the live name of an adapter's tensor."""
    layer = max((one for one in theirs if name.startswith(f"{one}.")), key=len)
    return peft_name(theirs[layer] + name[len(layer) :], group_of(name))


def _require_tensors(policy: Policy, plan: Plan, adapters: Adapters) -> None:
    theirs = _layers(policy, adapters)
    shapes = adapter_shapes(policy, make_groups(plan.adapted))
    wanted = {_key(name, theirs): shape for name, (_, shape) in shapes.items() if is_stored(name)}
    assert adapters.names is not None
    dead = tuple(
        f"{adapters.names.theirs(i.name).removesuffix('.weight')}." for i in policy.parts() if i.dead
    )
    saved = {adapters.names.theirs(name) for name in adapters.saved}
    have = {n: t for n, t in adapters.tensors.items() if n not in saved and not n.startswith(dead)}
    wrong = {
        "missing": [name for name in wanted if name not in have],
        "surplus": [name for name in have if name not in wanted],
        "misshapen": [
            f"{name} is {list(have[name].shape)}, not {list(shape)}"
            for name, shape in wanted.items()
            if name in have and tuple(have[name].shape) != tuple(shape)
        ],
        "not floating-point": [n for n in wanted if n in have and not have[n].is_floating_point()],
    }
    lines = [f"  {kind} ({len(names)}): {', '.join(names[:8])}" for kind, names in wrong.items() if names]
    if lines:
        raise WeightsError(
            f"{adapters.folder / TENSORS}: these are not the adapters that {CONFIG} tells of:\n"
            + "\n".join(lines)
        )
