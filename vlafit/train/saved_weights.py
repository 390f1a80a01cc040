"""Decide which weights a run's checkpoints hold, and in which precision.

A checkpoint that sits on a base holds the weights that differ from the base's, and the base's name and hash.
The masters in fp32 are in `training/`; where products are bf16, the part that is evaluated and exported holds
what is trained as these products read it, in bfloat16 (norms and projections stay fp32).
"""

import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from vlafit import checkpoints
from vlafit.nn.policy import Policy
from vlafit.policies import family, family_name
from vlafit.tuning import Plan
from vlafit.tuning.inject import adapter_tensors, base_name
from vlafit.tuning.quantise import quantised_names

log = logging.getLogger(__name__)

Saved = Literal["auto", "trained", "whole"]
STEP = re.compile(r"step_\d+|\d+")  # how runs of vlafit, LeRobot and openpi name a checkpoint's folder


@dataclass(frozen=True)
class SavedWeights:
    """The base of a run's checkpoints, None if they hold every weight, and the reason."""

    how: Literal["trained", "whole"]
    base: checkpoints.Base | None
    sentence: str = ""


def choose(
    wanted: Saved, plan: Plan, base: checkpoints.Base | None, changed: Collection[str]
) -> SavedWeights:
    """Return what checkpoints hold, if they may sit on `base`, from which the weights in `changed` differ.

    "auto" is "trained", unless the base is a checkpoint of another run, which that run or its owner may
    delete. Adapters sit on any base unless "whole" is wanted; quantised weights always have one.
    """
    if base is None:
        return SavedWeights("whole", None, "" if wanted != "trained" else _NO_BASE)
    if plan.quantised:
        return SavedWeights("trained", base, "" if wanted != "whole" else _QUANTISED)
    if wanted == "whole" or not (plan.adapted or _frozen(plan) - set(changed)):
        return SavedWeights("whole", None)
    if wanted == "auto" and not plan.adapted and in_a_run(base.checkpoint):
        return SavedWeights("whole", None, _IN_A_RUN.format(base=base.checkpoint))
    return SavedWeights("trained", base, _KEEP.format(base=base.checkpoint, sha256=base.sha256[:12]))


_NO_BASE = (
    'train.checkpoints = "trained" has no effect: no checkpoint is known to hold what training began with, '
    "so checkpoints hold every weight"
)
_QUANTISED = (
    'train.checkpoints = "whole" has no effect: quantised weights are never written, so checkpoints sit on '
    "the checkpoint that holds them in full precision"
)
_IN_A_RUN = (
    "checkpoints hold every weight, because {base} is a checkpoint of a run, which may be pruned or deleted; "
    "where it stays, --train.checkpoints trained saves only what this run trains"
)
_KEEP = (
    "checkpoints hold only what this run trains, on {base} (sha256 {sha256}): keep it. `vlafit export` "
    "writes a checkpoint that holds every weight; --train.checkpoints whole saves such ones"
)


def _frozen(plan: Plan) -> set[str]:
    """Return the weights that could learn, and that no stage trains."""
    stages = [plan.at(stage) for stage in range(len(plan.strategy.stages))]
    trained = {e.name for stage in stages for e in stage.entries if e.trainable}
    return {e.name for e in plan.entries if not (e.adapts or e.dead)} - trained


def in_a_run(checkpoint: str) -> bool:
    """Whether the path is that of a step's checkpoint in a run of vlafit, LeRobot or openpi."""
    path = Path(checkpoint)
    return path.is_dir() and (path.name == "pretrained_model" or STEP.fullmatch(path.name) is not None)


def to_save(policy: Policy, changed: Collection[str] | None) -> dict[str, nn.Parameter]:
    """Return the parameters that checkpoints hold, by live name: adapters, and the weights in `changed`.

    None: all, except quantised ones, which are never written.
    """
    adapters = adapter_tensors(policy)
    quantised = {f"{layer}.weight" for layer in quantised_names(policy)}
    return {
        name: parameter
        for name, parameter in policy.named_parameters()
        if name not in quantised and (changed is None or name in adapters or base_name(name) in changed)
    }


def rounded(policy: Policy, weights: Mapping[str, Tensor], trained: Collection[str]) -> dict[str, Tensor]:
    """Return `weights` by live name, those in `trained` in bfloat16 unless they compute in float32.

    Adapters stay as they are.
    """
    infos = {info.name: info for info in family(family_name(policy)).build(policy.config, "meta").parts()}
    learned = infos.keys() & set(trained)
    return {
        name: tensor.to(checkpoints.stored_as(infos[base], torch.bfloat16)) if base in learned else tensor
        for name, tensor in weights.items()
        for base in [base_name(name)]
    }


def sizes(folder: Path, base: checkpoints.Base | None) -> str:
    """Return the sizes of a saved checkpoint in words."""
    training = _bytes(folder / "training")
    weights = _bytes(folder) - training
    on = f" on {base.checkpoint}" if base is not None else ""
    return f"weights {_gb(weights)}{on}, training state {_gb(training)}"


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
