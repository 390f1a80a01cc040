"""Load a PEFT adapter folder onto a foreign checkpoint.

adapter_config.json says which modules carry an adapter, and of which kind; its names are the other program's.
Every module that it names must exist, every tensor beside it must find its place, and a setting that vlafit
does not repeat is refused by name. Such adapters become rules of a plan, as if they had been put in here.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlafit import tuning
from vlafit.checkpoints import hub
from vlafit.checkpoints.formats.base import StoredAdapters
from vlafit.checkpoints.formats.native import read as native
from vlafit.checkpoints.formats.native.adapters import CONFIG, PREFIX, TENSORS, is_stored, peft_name
from vlafit.checkpoints.formats.peft.adapter_config import reader, require_repeated
from vlafit.checkpoints.formats.peft.write import BASE
from vlafit.checkpoints.hub import Place
from vlafit.checkpoints.name_map import NameMap
from vlafit.checkpoints.tensor_files import open_tensors, read_json_object
from vlafit.errors import ConfigError, StrategyError, WeightsError, command_line
from vlafit.links import is_inside
from vlafit.nn.policy import Policy
from vlafit.tuning import Plan
from vlafit.tuning.inject import (
    adapter_shapes,
    adapter_tensors,
    group_of,
    layer_kind,
    make_groups,
)

WAYS = "--base on the command line, policy.base in a recipe, base= in Python"


@dataclass(frozen=True)
class PeftFolder:
    """A PEFT folder, its headers read."""

    path: Path
    config: Mapping[str, Any]
    """adapter_config.json."""
    tensors: Mapping[str, Tensor]
    """By their names in the file without peft's prefix."""
    base: Path


def recognise(path: Path) -> bool:
    """Whether `path` is a PEFT folder."""
    return (path / CONFIG).is_file()


def open_folder(folder: Path, base: str | Path | None, place: Callable[[str | Path], Place]) -> PeftFolder:
    """Read the headers of a PEFT folder and find its base: inside it, or where the caller says.

    Raises WeightsError where either is missing or damaged.
    """
    above = folder.resolve().parents[1]
    if native.recognise(above):
        raise WeightsError(f"{folder}: holds only the adapters of the checkpoint {above}: load that")
    path = folder / CONFIG
    config = read_json_object(path)
    if not isinstance(config.get("peft_type"), str):
        raise WeightsError(f"{path}: not an adapter_config.json of peft: it has no peft_type")
    if not (folder / TENSORS).is_file():
        raise WeightsError(
            f"{folder}: there is no {TENSORS} beside {CONFIG}; a pickle is not opened: convert it with"
            f" {command_line('convert-pickle', 'FILE', '--out', folder / TENSORS)}"
        )
    stored = open_tensors([folder / TENSORS])
    foreign = [name for name in stored if not name.startswith(PREFIX)]
    if foreign:
        raise WeightsError(
            f"{folder / TENSORS}: not peft's names, which begin with {PREFIX!r}: {foreign[:3]}"
        )
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in stored.items()}
    return PeftFolder(folder, config, tensors, _base_of(folder, config, base, place))


def _base_of(
    folder: Path,
    config: Mapping[str, Any],
    given: str | Path | None,
    place: Callable[[str | Path], Place],
) -> Path:
    inside = folder / BASE
    if inside.is_dir():
        if given is not None:
            raise WeightsError(f"{folder}: holds what its adapters sit on ({BASE}/); it takes no base")
        if not is_inside(folder, inside):
            raise WeightsError(
                f"{folder}: {BASE}/ is a link to {inside.resolve()}, outside this folder; if that is the "
                f"right base, remove the link and name it: {WAYS}"
            )
        return inside
    reference = config.get("base_model_name_or_path") if given is None else given
    if not reference:
        raise WeightsError(f"{folder}: {CONFIG} names no base; give its place: {WAYS}")
    revision = config.get("revision")
    if given is None and revision and hub.parse(str(reference)) == (str(reference), None):
        reference = f"{reference}@{revision}"
    if given is None and not _names_inside(folder, str(reference)):
        raise WeightsError(
            f"{folder}: {CONFIG} says that its adapters sit on {str(reference)!r}, which is not in this "
            "folder; a checkpoint may not choose what else is read. If that is the right base, name it: "
            f"base={str(reference)!r} ({WAYS})"
        )
    try:
        path = place(reference).path
    except (ConfigError, WeightsError) as error:
        raise WeightsError(
            f"{folder}: its adapters sit on {str(reference)!r}, which cannot be opened ({error}); give its "
            f"place: {WAYS}"
        ) from error
    if native.recognise(path) or recognise(path):
        raise WeightsError(
            f"{folder}: its base {path} is no plain checkpoint of another program: adapters on one of "
            "vlafit's"
            " are saved, and loaded, as a checkpoint of vlafit"
        )
    return path


def _names_inside(folder: Path, reference: str) -> bool:
    path = Path(reference)
    return path.exists() and is_inside(folder, path)


def saved_modules(folder: PeftFolder, names: NameMap, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights in full that lie beside the adapters (modules_to_save), by our names."""
    saved = {
        names.policy_name(name): tensor
        for name, tensor in folder.tensors.items()
        if _is_saved(folder, name) and name not in unused_heads(folder, names)
    }
    unknown = [name for name in saved if name not in weights]
    if unknown:
        raise WeightsError(f"{folder.path}: modules_to_save are not of its base: {unknown[:3]}")
    return saved


def unused_heads(folder: PeftFolder, names: NameMap) -> tuple[str, ...]:
    """Return the output heads among the weights in full, which feed no action.

    peft copies a head that was tied to the embedding, and leaves the embedding to the base.
    """
    heads = {*names.ties.values(), *names.unused}
    return tuple(name for name in folder.tensors if name in heads and _is_saved(folder, name))


def _is_saved(folder: PeftFolder, name: str) -> bool:
    module = name.rpartition(".")[0]
    saved = folder.config.get("modules_to_save") or ()
    return any(module == one or module.endswith(f".{one}") for one in saved)


@dataclass(frozen=True)
class PeftAdapters(StoredAdapters):
    """The adapters of a PEFT folder, read but not put in."""

    folder: PeftFolder
    names: NameMap
    """Our names and those of the program's modules."""
    saved: tuple[str, ...]
    """Our names of the weights in full that lie beside them."""

    def plan(self, policy: Policy) -> Plan:
        """Return the adapters as a plan for the bare policy, which may be on the meta device.

        Raises WeightsError naming modules that do not exist, settings that vlafit does not repeat, and every
        tensor that is missing, surplus or misshapen.
        """
        path = self.folder.path / CONFIG
        modules = _modules(policy, self.names)
        dead = {info.name for info in policy.parts() if info.dead}
        targets = _targets(modules, self.folder.config, path)
        rules = self._rules([layer for layer in targets if f"{layer}.weight" not in dead], modules)
        try:
            plan = tuning.preview(policy, tuning.parse(rules, name="peft", where=str(path)))
        except StrategyError as error:
            raise WeightsError(f"{path}: these adapters cannot be put into the policy: {error}") from error
        for group in make_groups(plan.adapted):
            require_repeated(group, modules, self.folder.config, path)
        self._require_tensors(policy, plan, modules)
        return plan

    @torch.no_grad()
    def attach(self, policy: Policy, plan: Plan) -> None:
        """Put the adapters into the filled policy. Raises WeightsError for numbers that are not finite."""
        modules = _modules(policy, self.names)
        tuning.restore(policy, plan)
        live = dict(policy.named_parameters())
        broken = []
        for name in adapter_tensors(policy):
            if not is_stored(name):
                continue
            value = self.folder.tensors[_key(name, modules)]
            if torch.isfinite(value).all():
                live[name].copy_(value)
            else:
                broken.append(name)
        if broken:
            raise WeightsError(f"{self.folder.path}: adapters are not finite: {', '.join(broken)}")

    def _rules(self, layers: Sequence[str], modules: Mapping[str, str]) -> list[dict[str, Any]]:
        """Return the rules that put these adapters in: one a setting, and one for the weights beside them."""
        settings: dict[str, tuple[dict[str, Any], list[str]]] = {}
        read = reader(self.folder.config, self.folder.path / CONFIG)
        for layer in layers:
            options = read(modules[layer])
            settings.setdefault(repr(options), (options, []))[1].append(f"{layer}.weight")
        rules = [{"select": {"pattern": names}, **options} for options, names in settings.values()]
        if self.saved:
            rules.append({"select": {"pattern": list(self.saved)}, "mode": "full"})
        return [*rules, {"mode": "frozen"}]

    def _require_tensors(self, policy: Policy, plan: Plan, modules: Mapping[str, str]) -> None:
        shapes = adapter_shapes(policy, make_groups(plan.adapted))
        wanted = {_key(name, modules): shape for name, (_, shape) in shapes.items() if is_stored(name)}
        dead = tuple(
            f"{self.names.file_name(i.name).removesuffix('.weight')}." for i in policy.parts() if i.dead
        )
        saved = {self.names.file_name(name) for name in self.saved} | {*unused_heads(self.folder, self.names)}
        have = {n: t for n, t in self.folder.tensors.items() if n not in saved and not n.startswith(dead)}
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
                f"{self.folder.path / TENSORS}: these are not the adapters that {CONFIG} tells of:\n"
                + "\n".join(lines)
            )


def _modules(policy: Policy, names: NameMap) -> dict[str, str]:
    """Return, for every layer of the policy that could carry an adapter, the other program's module."""
    weights = [name for name, _ in policy.named_parameters() if layer_kind(policy, name)]
    modules = {name: names.file_name(name).removesuffix(".weight") for name in weights}
    return {
        name.removesuffix(".weight"): module
        for name, module in modules.items()
        if not module.startswith(names.apart)
    }


def _targets(modules: Mapping[str, str], config: Mapping[str, Any], path: Path) -> list[str]:
    """Return our layers that target_modules names, as peft matches it."""
    target = config.get("target_modules")
    if isinstance(target, str):
        matched = [layer for layer, module in modules.items() if re.fullmatch(target, module)]
        if not matched and target.lower() == "all-linear":
            raise WeightsError(
                f"{path}: target_modules {target!r} is not resolved here: list the modules that have "
                "adapters, as peft does when it saves (get_peft_model(...).save_pretrained)"
            )
        if not matched:
            raise WeightsError(f"{path}: no module of the base matches target_modules {target!r}")
        return matched
    if not isinstance(target, list) or not target:
        raise WeightsError(f"{path}: target_modules must be a list of modules or a pattern, not {target!r}")
    missing = [t for t in target if not any(m == t or m.endswith(f".{t}") for m in modules.values())]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise WeightsError(
            f"{path}: target_modules not found in the base model, or not adaptable:"
            f" {', '.join(map(str, missing[:3]))}{more}"
        )
    exact = set(target)
    return [
        layer
        for layer, module in modules.items()
        if module in exact or any(module.endswith(f".{t}") for t in target)
    ]


def _key(name: str, modules: Mapping[str, str]) -> str:
    """Return the name in the file for the live name of an adapter's tensor."""
    layer = max((module for module in modules if name.startswith(f"{module}.")), key=len)
    return peft_name(modules[layer] + name[len(layer) :], group_of(name))
