"""Write our own checkpoint, whole or not at all; `native.py` and `adapted.py` say what lies in it."""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vlafit import files, shipped
from vlafit.checkpoints import adapted
from vlafit.checkpoints.adapted import Base
from vlafit.checkpoints.identity import MANIFEST, digest
from vlafit.checkpoints.lineage import Lineage
from vlafit.checkpoints.load import load
from vlafit.checkpoints.native import FORMAT, PLAN, POLICY, RECIPE, WEIGHTS
from vlafit.codec import Codec
from vlafit.errors import WeightsError
from vlafit.nn.policy import Policy
from vlafit.policies import family_name
from vlafit.tuning import Plan
from vlafit.tuning.inject import adapter_tensors, base_name
from vlafit.tuning.quantise import quantised_names


def save(
    policy: Policy,
    folder: str | Path,
    codec: Codec | None = None,
    *,
    plan: Plan | None = None,
    recipe: str | None = None,
    history: Lineage | None = None,
    weights: Mapping[str, Tensor] | None = None,
    base: str | Path | Base | None = None,
    changed: Collection[str] | None = None,
) -> None:
    """Write a checkpoint; `folder` appears whole, and an older one there is replaced.

    `plan` says what learned, and where adapters sit; a policy with adapters needs it. `recipe` is the
    resolved recipe's TOML, `history` what the weights learned from. `weights` replace the policy's own (a
    moving average, or what sharded processes gathered) and must have exactly its names and shapes.

    With adapters, `base` names the checkpoint that they sit on (a path, or one that ships), and then only the
    adapters are written and those weights below them that differ from it: those named in `changed`, or found
    by comparison. Without `base` everything is written.

    Raises WeightsError when the pieces do not belong together, or a quantised policy has no `base`.
    """
    folder = Path(folder)
    live = dict(policy.named_parameters())
    given = live if weights is None else weights
    if {name: t.shape for name, t in given.items()} != {name: p.shape for name, p in live.items()}:
        odd = sorted(
            n for n in {*given, *live} if n not in given or n not in live or given[n].shape != live[n].shape
        )
        raise WeightsError(f"{folder}: the weights to save are not the policy's; they differ in {odd[:5]}")
    adapters = adapter_tensors(policy)
    own = {base_name(name): tensor for name, tensor in given.items() if name not in adapters}
    quantised = {base_name(f"{layer}.weight") for layer in quantised_names(policy)}
    _require_belonging(folder, plan, adapters, own, quantised, base)
    if isinstance(base, str | Path):
        place = shipped.find("checkpoint", base)
        recorded = str(base) if not Path(base).exists() else str(Path(base).resolve())
        base = Base(recorded, digest(place))
        if changed is None:
            changed = _differing(policy, own, quantised, place, plan)
    if base is not None and changed is not None:
        own = {name: tensor for name, tensor in own.items() if name in changed and name not in quantised}
    described = {"format": FORMAT, "family": family_name(policy), "config": asdict(policy.config)}
    with files.new_folder(folder) as partial:
        (partial / POLICY).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in own.items()}
        save_file(
            tensors, partial / (WEIGHTS if base is None else adapted.TRAINED), metadata={"format": "pt"}
        )
        if base is not None:
            base.write(partial)
        if adapters:
            assert plan is not None
            adapted.write(partial, policy, plan, given, base)
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


def _require_belonging(
    folder: Path,
    plan: Plan | None,
    adapters: Collection[str],
    own: Collection[str],
    quantised: Collection[str],
    base: str | Path | Base | None,
) -> None:
    if adapters and plan is None:
        raise WeightsError(f"{folder}: its adapters have a plan, which apply_strategy returned: give it")
    if plan is not None:
        planned = {e.name for e in plan.entries}
        if planned != {*own, *adapters}:
            odd = sorted(planned ^ {*own, *adapters})
            raise WeightsError(
                f"{folder}: the plan is not of this policy; they differ in {odd[:3]}. A policy whose "
                "adapters were merged is saved without a plan"
            )
    if base is not None and not adapters:
        raise WeightsError(f"{folder}: base is for a policy with adapters; this one has none")
    if quantised and base is None:
        raise WeightsError(
            f"{folder}: {len(quantised)} weights are quantised, and would be lost; name the checkpoint that "
            "they come from as `base`, or merge first (vlafit.merge), which keeps their rounded values"
        )


def _differing(
    policy: Policy, own: Mapping[str, Tensor], quantised: Collection[str], place: Path, plan: Plan | None
) -> set[str]:
    """Return the names of the weights that are not those of the checkpoint at `place`, bit for bit."""
    theirs = dict(load(place).policy.named_parameters())
    if {n: t.shape for n, t in theirs.items() if n not in quantised} != {
        n: t.shape for n, t in own.items() if n not in quantised
    }:
        raise WeightsError(f"{place}: is not the base of this policy: names or shapes differ")
    pissa = {f"{layer}.weight" for layer, a in (plan.adapted if plan else {}).items() if a.init == "pissa"}
    kept = {*quantised, *pissa}  # the first cannot learn; from the second PiSSA took its initial factors
    return {
        name
        for name, tensor in own.items()
        if name not in kept and not torch.equal(tensor.detach().cpu(), theirs[name].to(tensor.dtype))
    }
