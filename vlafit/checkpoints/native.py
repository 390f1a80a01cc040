"""Our own checkpoint: a folder that a person can read, written whole or not at all, verified when opened.

policy.json (family and config), model.safetensors, codec.json and tokenizer/, plan.json, recipe.toml,
history.json (what it learned from), and manifest.json with the SHA-256 of each. What others put beside them
(a run's training/) is left alone.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from vlafit import config as configuration
from vlafit import files
from vlafit.checkpoints.lineage import FILE as HISTORY
from vlafit.checkpoints.lineage import Lineage
from vlafit.codec import Codec
from vlafit.errors import WeightsError
from vlafit.nn.policy import Policy
from vlafit.policies import family, family_name
from vlafit.tuning import Plan

FORMAT = 1  # of policy.json and manifest.json
POLICY, WEIGHTS, MANIFEST = "policy.json", "model.safetensors", "manifest.json"
CODEC, PLAN, RECIPE = "codec.json", "plan.json", "recipe.toml"


@dataclass(frozen=True)
class Opened:
    """What a native checkpoint says, before its weights are read."""

    family: str
    config: Any
    weights: Path
    codec: Codec | None
    plan: Plan | None


def save(
    folder: Path,
    policy: Policy,
    codec: Codec | None,
    *,
    plan: Plan | None = None,
    recipe: str | None = None,
    history: Lineage | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint; `folder` appears whole, and an older one there is replaced.

    `recipe` is the resolved recipe's TOML, `history` what the weights learned from. `weights` replace the
    policy's own (a moving average, or what sharded processes gathered) and must have exactly its names and
    shapes.
    """
    shapes = {name: p.shape for name, p in policy.named_parameters()}
    given = dict(policy.named_parameters()) if weights is None else weights
    if {name: tensor.shape for name, tensor in given.items()} != shapes:
        odd = sorted(n for n in {*given, *shapes} if n not in given or given[n].shape != shapes.get(n))
        raise WeightsError(f"{folder}: the weights to save are not the policy's; they differ in {odd[:5]}")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in given.items()}
    described = {"format": FORMAT, "family": family_name(policy), "config": asdict(policy.config)}
    with files.new_folder(Path(folder)) as partial:
        (partial / POLICY).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        if codec is not None:
            codec.save(partial)
        if plan is not None:
            (partial / PLAN).write_text(plan.to_json() + "\n", encoding="utf-8")
        if recipe is not None:
            (partial / RECIPE).write_text(recipe, encoding="utf-8")
        if history is not None:
            history.write(partial)
        written = sorted(p for p in partial.rglob("*") if p.is_file())
        hashes = {p.relative_to(partial).as_posix(): files.sha256(p) for p in written}
        content = {"format": FORMAT, "files": hashes}
        (partial / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def recognise(folder: Path) -> bool:
    """Whether `folder` is a native checkpoint, whole or damaged."""
    return (folder / MANIFEST).is_file() or (folder / POLICY).is_file()


def open_folder(folder: Path, hash_weights: bool = True) -> Opened:
    """Verify every file's hash and read all but the weights.

    Without `hash_weights` the weights' file must be there, and is not read. Raises WeightsError naming files
    that are missing, changed or not in the manifest.
    """
    _verify(folder, () if hash_weights else (WEIGHTS,))
    path = folder / POLICY
    described = _read(path, {"format", "family", "config"})
    module = family(str(described["family"]))
    config = configuration.build(module.Config, described["config"], f"{path}: config")
    codec = Codec.load(folder) if (folder / CODEC).is_file() else None
    plan = Plan.from_json((folder / PLAN).read_text(encoding="utf-8")) if (folder / PLAN).is_file() else None
    return Opened(str(described["family"]), config, folder / WEIGHTS, codec, plan)


def digest(path: Path) -> str:
    """Return a SHA-256 that stands for the whole checkpoint at `path`.

    It is the manifest's; where another program wrote the checkpoint, that of all its files' names and hashes.
    """
    if (path / MANIFEST).is_file():
        return files.sha256(path / MANIFEST)
    found = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    listed = {p.relative_to(path).as_posix(): files.sha256(p) for p in found}
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def _verify(folder: Path, unread: Sequence[str] = ()) -> None:
    path = folder / MANIFEST
    if not path.is_file():
        raise WeightsError(f"{folder}: {MANIFEST} is missing; the checkpoint was not written to its end")
    listed = _read(path, {"format", "files"})["files"]
    if not isinstance(listed, dict) or not {POLICY, WEIGHTS} <= set(listed):
        raise WeightsError(f"{path}: 'files' must list at least {POLICY} and {WEIGHTS}")
    ours = [folder / name for name in (CODEC, PLAN, RECIPE, HISTORY)] + sorted(folder.glob("tokenizer/*"))
    present = {p.relative_to(folder).as_posix() for p in ours if p.is_file()}
    lost = [name for name in listed if not (folder / name).is_file()]
    read = {n: h for n, h in listed.items() if n not in lost and n not in unread}
    wrong = {
        "missing": lost,
        "changed": [name for name, digest in read.items() if files.sha256(folder / name) != digest],
        "not in the manifest": sorted(present - set(listed)),
    }
    lines = [f"  {kind}: {', '.join(names)}" for kind, names in wrong.items() if names]
    if lines:
        raise WeightsError(
            f"{folder}: the checkpoint's files are not those that were saved:\n" + "\n".join(lines) + "\n"
            "Copy the checkpoint again; to change it, load it and save it anew."
        )


def _read(path: Path, keys: set[str]) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(values, dict) or set(values) != keys:
        have = sorted(values) if isinstance(values, dict) else type(values).__name__
        raise WeightsError(f"{path}: must have exactly the keys {sorted(keys)}, there are {have}")
    if values["format"] != FORMAT:
        raise WeightsError(f"{path}: format {values['format']!r}; this version reads format {FORMAT}")
    return values
