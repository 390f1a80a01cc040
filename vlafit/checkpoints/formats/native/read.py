"""Read vlafit's own checkpoint: a folder that a person can read, verified when opened.

policy.json (family and config), model.safetensors, codec.json and tokenizer/, plan.json, recipe.toml,
history.json (what it learned from), agreement.json (what its data and its base agreed on), and manifest.json
with the SHA-256 of each. Adapters have folders of their own (adapters/). The weights, adapters or not, may
sit on another checkpoint (base.json, trained.safetensors): see `adapters.py`.
What others put beside them (a run's training/) is left alone. `vlafit.checkpoints.save` writes it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vlafit import files
from vlafit.agreement.values import FILE as AGREEMENT
from vlafit.checkpoints.formats.native.adapters import ADAPTERS, BASE, TRAINED, Base, read_base
from vlafit.checkpoints.history import FILE as HISTORY
from vlafit.checkpoints.history import read_lineage
from vlafit.checkpoints.tensor_files import read_json_object, read_text
from vlafit.codec import CodecSet
from vlafit.errors import ConfigError, WeightsError
from vlafit.links import is_inside
from vlafit.nn.policy import MOST_SAMPLING_STEPS, is_sampling_steps
from vlafit.policies import build_config, family
from vlafit.tuning import Plan

VERSION = 1  # of policy.json and manifest.json
MANIFEST = "manifest.json"
"""It holds the SHA-256 of every file, so its own stands for them all."""
POLICY, WEIGHTS = "policy.json", "model.safetensors"
STEPS = "steps"
MAX_DELAY = "max_delay"
MOST_DELAY = 2**12  # steps of a chunk
"""Key of policy.json: steps in which the policy samples, where that is not the family's number."""
CODEC, PLAN, RECIPE = "codec.json", "plan.json", "recipe.toml"


@dataclass(frozen=True)
class NativeFolder:
    """The content of a native checkpoint, without its weights."""

    family: str
    config: Any
    weights: Path
    """The file of all weights; of those that differ from `base` where there is one."""
    codec: CodecSet | None
    plan: Plan | None
    base: Base | None = None
    steps: int | None = None
    """Steps in which the policy samples; None: the family's number."""
    max_delay: int = 0
    """Most steps of a chunk that the policy was trained to be given."""


def recognise(folder: Path) -> bool:
    """Whether `folder` is a native checkpoint, whole or damaged."""
    return (folder / MANIFEST).is_file() or (folder / POLICY).is_file()


def open_folder(folder: Path, hash_weights: bool = True, trust: Sequence[str] = ()) -> NativeFolder:
    """Verify every file's hash and read all but the weights.

    Without `hash_weights` the weights' file must be there, and is not read. `trust` names packages from which
    the module of its family may be imported. Raises WeightsError naming files that are missing, changed or
    not in the manifest, or damaged, or a family that is not trusted.
    """
    _verify(folder, () if hash_weights else (WEIGHTS, TRAINED))
    path = folder / POLICY
    described = _read(path, {"format", "family", "config"}, {STEPS, MAX_DELAY})
    steps = described.get(STEPS)
    if steps is not None and not is_sampling_steps(steps):
        raise WeightsError(
            f"{path}: {STEPS} is {steps!r}; a policy samples in 1 to {MOST_SAMPLING_STEPS} steps"
        )
    max_delay = described.get(MAX_DELAY, 0)
    if type(max_delay) is not int or not 0 <= max_delay <= MOST_DELAY:
        raise WeightsError(
            f"{path}: {MAX_DELAY} is {max_delay!r}; it must be a whole number from 0 to {MOST_DELAY}"
        )
    try:
        module = family(str(described["family"]), trust)
    except ConfigError as error:
        raise WeightsError(f"{path}: {error}") from error
    config = build_config(module, described["config"], f"{path}: config")
    codec = CodecSet.load(folder) if (folder / CODEC).is_file() else None
    path = folder / PLAN
    plan = Plan.from_json(read_text(path), str(path)) if path.is_file() else None
    base = read_base(folder)
    read_lineage(folder)  # what needs it later would fail then
    tuned = plan is not None and (plan.adapted or plan.quantised)
    if (folder / ADAPTERS).is_dir() and not tuned:
        raise WeightsError(f"{folder}: has adapters, but {PLAN} does not say where they sit")
    weights = folder / (WEIGHTS if base is None else TRAINED)
    return NativeFolder(str(described["family"]), config, weights, codec, plan, base, steps, max_delay)


def _verify(folder: Path, unread: Sequence[str] = ()) -> None:
    path = folder / MANIFEST
    if not path.is_file():
        raise WeightsError(f"{folder}: {MANIFEST} is missing; the checkpoint was not written to its end")
    listed = _read(path, {"format", "files"})["files"]
    if not isinstance(listed, dict) or not (
        {POLICY, WEIGHTS} <= set(listed) or {POLICY, BASE} <= set(listed)
    ):
        raise WeightsError(f"{path}: 'files' must list at least {POLICY} and {WEIGHTS}")
    known = [folder / name for name in (CODEC, PLAN, RECIPE, HISTORY, BASE, TRAINED, AGREEMENT)]
    known += sorted(folder.glob("tokenizer/*")) + sorted(folder.glob(f"{ADAPTERS}/*/*"))
    present = {p.relative_to(folder).as_posix() for p in known if p.is_file()}
    outside = [name for name in listed if not _is_below(name)]
    # The weights may be a link of the user's, to a larger disk: they hold numbers and nothing else.
    outside += [n for n in listed if n not in (*outside, WEIGHTS) and not is_inside(folder, folder / n)]
    if outside:
        raise WeightsError(
            f"{path}: lists files that are not in the checkpoint's folder, or are links out of it: "
            f"{outside[:3]}; put the files themselves there"
        )
    missing = [name for name in listed if not (folder / name).is_file()]
    read = {n: h for n, h in listed.items() if n not in missing and n not in unread}
    wrong = {
        "missing": missing,
        "changed": [name for name, digest in read.items() if files.sha256(folder / name) != digest],
        "not in the manifest": sorted(present - set(listed)),
    }
    lines = [f"  {kind}: {', '.join(names)}" for kind, names in wrong.items() if names]
    if lines:
        raise WeightsError(
            f"{folder}: the checkpoint's files are not those that were saved:\n" + "\n".join(lines) + "\n"
            "Copy the checkpoint again; to change it, load it and save it anew."
        )


def _is_below(name: str) -> bool:
    return not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts


def _read(path: Path, keys: set[str], optional: Collection[str] = ()) -> dict[str, Any]:
    values = read_json_object(path)
    if set(values) - set(optional) != keys:
        raise WeightsError(f"{path}: must have exactly the keys {sorted(keys)}, there are {sorted(values)}")
    if values["format"] != VERSION:
        raise WeightsError(f"{path}: format {values['format']!r}; this version reads format {VERSION}")
    return values
