"""Write the files of a native checkpoint into a folder that is being made."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from vlafit import files
from vlafit.agreement import Agreement
from vlafit.checkpoints.formats.native import adapters
from vlafit.checkpoints.formats.native.adapters import Base
from vlafit.checkpoints.formats.native.read import (
    MANIFEST,
    MAX_DELAY,
    PLAN,
    POLICY,
    RECIPE,
    STEPS,
    VERSION,
    WEIGHTS,
)
from vlafit.checkpoints.history import Lineage
from vlafit.codec import Codec, CodecSet
from vlafit.nn.deferred import save_tensors
from vlafit.nn.flow_policy import FlowPolicy
from vlafit.nn.policy import Policy
from vlafit.policies import family_name
from vlafit.tuning import Plan
from vlafit.tuning.inject import adapter_tensors


def write_folder(
    folder: Path,
    policy: Policy,
    weights: Mapping[str, Tensor],
    codec: Codec | CodecSet | None = None,
    plan: Plan | None = None,
    recipe: str | None = None,
    history: Lineage | None = None,
    live: Mapping[str, Tensor] | None = None,
    base: Base | None = None,
    agreement: Agreement | None = None,
) -> None:
    """Write everything, the manifest last. `weights` are those below adapters, by our names.

    `live` holds the adapters' tensors by the policy's own names. With a `base`, `weights` are those that are
    not taken from it.
    """
    described = {"format": VERSION, "family": family_name(policy), "config": asdict(policy.config)}
    if policy.steps != type(policy).steps:
        described[STEPS] = policy.steps
    if isinstance(policy, FlowPolicy) and policy.max_delay:
        described[MAX_DELAY] = policy.max_delay
    (folder / POLICY).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_tensors(tensors, folder / (WEIGHTS if base is None else adapters.TRAINED), {"format": "pt"})
    if base is not None:
        base.write(folder)
    if adapter_tensors(policy):
        assert plan is not None and live is not None
        adapters.write(folder, policy, plan, live, base)
    if codec is not None:
        codec.save(folder)
    if plan is not None:
        (folder / PLAN).write_text(plan.to_json() + "\n", encoding="utf-8")
    if recipe is not None:
        (folder / RECIPE).write_text(recipe, encoding="utf-8")
    if history is not None:
        history.write(folder)
    if agreement is not None:
        agreement.write(folder)
    written = sorted(p for p in folder.rglob("*") if p.is_file())
    hashes = {p.relative_to(folder).as_posix(): files.sha256(p) for p in written}
    content = {"format": VERSION, "files": hashes}
    (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
