"""Read and write the adapters of a native checkpoint, and the base checkpoint that it may sit on.

A checkpoint without adapters may sit on a base, too: it then holds what was trained in full.

`adapters/NAME/`, one folder for each group of equal settings, holds adapter_config.json and
adapter_model.safetensors in peft's own form and names. plan.json says which layers they belong to. A
checkpoint holds every weight (model.safetensors); or it names the checkpoint they come from with its hash
(base.json), and holds only what differs from it (trained.safetensors).
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlafit import tuning
from vlafit.checkpoints.formats.base import StoredAdapters
from vlafit.checkpoints.hub import Place
from vlafit.checkpoints.tensor_files import open_tensors, read_json_object
from vlafit.errors import ConfigError, WeightsError
from vlafit.nn.policy import Policy
from vlafit.tuning import Plan
from vlafit.tuning.inject import (
    Group,
    adapter_tensors,
    as_new,
    group_of,
    initial_factors,
    make_groups,
    peft_config,
    save_config,
    take_residual,
)

ADAPTERS, BASE, TRAINED = "adapters", "base.json", "trained.safetensors"
CONFIG, TENSORS, INITIAL = "adapter_config.json", "adapter_model.safetensors", "initial.safetensors"
PREFIX = "base_model.model."  # which peft's own model class puts before every name
VERSION = 1  # of base.json
NAME_IT = (
    "Name where that checkpoint lies: --base PATH (vlafit train: --policy.base PATH; in Python: base=...)"
)


@dataclass(frozen=True)
class Base:
    """The checkpoint that holds the weights which another one does not hold itself."""

    checkpoint: str
    """A path, the name of one that ships, or an id of the Hub with its commit; see `hub.Place`. A path that
    begins with a dot goes from the checkpoint's folder."""
    sha256: str
    """Of its manifest, or of its files; see `vlafit.checkpoints.digest`."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The `config` that `load` needs to read it, beside the policy's config; see `Source`."""
    format: int = VERSION

    def write(self, folder: Path) -> None:
        """Write base.json into a checkpoint that is being made."""
        values = {key: value for key, value in asdict(self).items() if key != "config" or value}
        (folder / BASE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_base(folder: Path) -> Base | None:
    """Read base.json; None where the checkpoint holds its own weights."""
    path = folder / BASE
    if not path.is_file():
        return None
    try:
        base = Base(**read_json_object(path))
    except TypeError as error:
        raise WeightsError(f"{path}: not the base.json of this version: {error}") from error
    if base.format != VERSION:
        raise WeightsError(f"{path}: format {base.format}; this version reads format {VERSION}")
    return base


def names_on_base(folder: Path) -> list[str]:
    """Return the names of the weights that the checkpoint `folder` does not take from its base."""
    return list(open_tensors([folder / TRAINED]))


def find_base(
    folder: Path,
    base: Base,
    given: str | Path | None,
    place: Callable[[str | Path], Place],
    digest: Callable[[Path], str],
) -> Path:
    """Return the path of the checkpoint that `folder` sits on; `given` is where the caller says.

    Raises WeightsError where there is none, or another one.
    """
    reference = base.checkpoint if given is None else str(given)
    if given is None and reference.startswith("."):
        reference = str(folder.resolve() / reference)
    try:
        path = place(reference).path
    except ConfigError as error:
        raise WeightsError(
            f"{folder}: holds only what was trained; its base, the checkpoint {reference!r}, is not there. "
            f"{NAME_IT}"
        ) from error
    except WeightsError as error:  # of the Hub
        raise WeightsError(f"{folder}: its base is a checkpoint of the Hub. {error}") from error
    if given is None:
        _require_bounded(path, folder)
    if (sha256 := digest(path)) != base.sha256:
        raise WeightsError(
            f"{folder}: was trained on another checkpoint than {path}: the SHA-256 is {sha256}, not "
            f"{base.sha256}. {NAME_IT}"
        )
    return path


def _require_bounded(path: Path, folder: Path) -> None:
    """Raise WeightsError for a base whose hash would take for ever: a device, or a folder with all this."""
    endless = path.exists() and not path.is_dir() and not path.is_file()
    if endless or folder.resolve().is_relative_to(path.resolve()):
        raise WeightsError(
            f"{folder / BASE}: names {str(path)!r}, which is no checkpoint; give the right one: base=..."
        )


@dataclass(frozen=True)
class NativeAdapters(StoredAdapters):
    """The adapters of a native checkpoint, not read yet."""

    folder: Path
    stored: Plan
    base: Base | None

    def plan(self, policy: Policy) -> Plan:
        """Return the plan that the checkpoint records."""
        return self.stored

    def attach(self, policy: Policy, plan: Plan) -> None:
        """Put the adapters into the bare policy, exactly; raises as `fill` does."""
        tuning.restore(policy, plan)
        fill(self.folder, policy, plan, self.base)


def write(folder: Path, policy: Policy, plan: Plan, tensors: Mapping[str, Tensor], base: Base | None) -> None:
    """Write the adapters of `policy` into a checkpoint that is being made, from `tensors` by live name."""
    adapters = adapter_tensors(policy)
    for group in make_groups(plan.adapted):
        place = folder / ADAPTERS / group.name
        place.mkdir(parents=True)
        # Over its own residual PiSSA is plain LoRA; peft would decompose the residual again.
        config = peft_config(group if base is not None else as_new(group))
        config.inference_mode = True
        config.base_model_name_or_path = base.checkpoint if base else None
        config.revision = f"sha256:{base.sha256}" if base else None
        save_config(config, place)
        held = {n: t for n, t in tensors.items() if n in adapters and group_of(n) == group.name}
        own = {PREFIX + peft_name(n, group.name): _plain(t) for n, t in held.items() if is_stored(n)}
        save_file(own, place / TENSORS, metadata={"format": "pt"})
        if group.adapter.init == "pissa" and base is not None:
            factors = initial_factors(policy, group)
            save_file({k: _plain(v) for k, v in factors.items()}, place / INITIAL)


@torch.no_grad()
def fill(folder: Path, policy: Policy, plan: Plan, base: Base | None) -> None:
    """Fill the adapters of `policy`, which are there but as new, from the checkpoint `folder`, exactly.

    Raises WeightsError naming every tensor that is missing, surplus, misshapen or not finite.
    """
    live = dict(policy.named_parameters())
    changed = names_on_base(folder) if base is not None else []
    wrong: list[str] = []
    for group in make_groups(plan.adapted):
        place = folder / ADAPTERS / group.name
        _require_same_config(place, group)
        names = {
            PREFIX + peft_name(n, group.name): n
            for n in adapter_tensors(policy)
            if group_of(n) == group.name and is_stored(n)
        }
        stored = open_tensors([place / TENSORS])
        wrong += [f"missing {group.name}: {n}" for n in names if n not in stored]
        wrong += [f"surplus {group.name}: {n}" for n in stored if n not in names]
        for key, name in names.items():
            if key not in stored:
                continue
            value = stored[key]
            if value.shape != live[name].shape:
                wrong.append(
                    f"misshapen {group.name}: {key} is {list(value.shape)}, not {list(live[name].shape)}"
                )
            elif not value.is_floating_point():
                wrong.append(f"not floating-point {group.name}: {key} is {value.dtype}")
            elif not torch.isfinite(value.to(live[name].dtype)).all():  # too large for it counts, too
                wrong.append(f"not finite {group.name}: {key}")
            else:
                live[name].copy_(value)
        if group.adapter.init == "pissa" and base is not None:
            take_residual(policy, group, load_file(place / INITIAL), changed)
    if wrong:
        raise WeightsError(f"{folder}: the adapters are not those of plan.json:\n  " + "\n  ".join(wrong))


def _require_same_config(place: Path, group: Group) -> None:
    """Raise WeightsError where adapter_config.json does not agree with plan.json."""
    path = place / CONFIG
    stored = read_json_object(path)
    want: dict[str, Any] = peft_config(group).to_dict()
    for key in (
        "peft_type",
        "r",
        "lora_alpha",
        "alpha",
        "init_r",
        "use_dora",
        "use_rslora",
        "oft_block_size",
    ):
        if key in want and stored.get(key) != getattr(want[key], "value", want[key]):
            raise WeightsError(f"{path}: {key} is {stored.get(key)!r}, plan.json says {want[key]!r}")
    if set(stored.get("target_modules") or ()) != set(want["target_modules"]):
        raise WeightsError(f"{path}: target_modules are not the layers that plan.json adapts")


def is_stored(name: str) -> bool:
    """Whether files hold the adapter's tensor with this live name."""
    return ".ranknum." not in name  # AdaLoRA's count, which is the rank it began with


def peft_name(name: str, group: str) -> str:
    """Return peft's name in files for an adapter's tensor: its live name without the adapter's own."""
    name = name.replace(f".lora_magnitude_vector.{group}.weight", ".lora_magnitude_vector")
    words = name.split(".")
    at = -2 if words[-1] in ("weight", "bias") else -1
    if words[at] == group:
        del words[at]
    return ".".join(words)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()
