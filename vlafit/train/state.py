"""What a run needs to go on as if it had never stopped: weights, optimiser, average, step; and where it lies.

A checkpoint `checkpoints/step_000500/` is a native checkpoint (what is evaluated and exported: the moving
average where there is one) with a folder `training/` beside it: the raw trainable weights, AdamW's states and
the step, as safetensors and JSON. Order, noise and time need no state: they are functions of the step.
"""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlafit import files
from vlafit.errors import TrainingError
from vlafit.train.optim import Ema
from vlafit.train.parallel import gathered, scatter_like

log = logging.getLogger(__name__)
FORMAT = 1


@dataclass(frozen=True)
class Progress:
    """Where a run stands: optimiser steps done, seconds of training so far, the best validation loss."""

    step: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None


def collect(policy: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None) -> dict[str, Tensor]:
    """Return the whole training state by name, on the CPU. Every process must call it."""
    names = {parameter: name for name, parameter in policy.named_parameters()}
    tensors: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[parameter]
            tensors[f"weight/{name}"] = parameter
            for key, value in optimizer.state[parameter].items():
                tensors[f"adamw.{key}/{name}"] = value
    if ema is not None:
        tensors |= {f"ema/{name}": value for name, value in ema.average.items()}
    return gathered(tensors)


def write(folder: Path, tensors: dict[str, Tensor], progress: Progress, ema: Ema | None) -> None:
    """Write `training/` into a checkpoint that is still being made."""
    (folder / "training").mkdir()
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "training" / "state.safetensors")
    facts = {"format": FORMAT, "ema_updates": ema.updates if ema else None, **progress.__dict__}
    (folder / "training" / "state.json").write_text(json.dumps(facts, indent=2) + "\n")


def restore(folder: Path, policy: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None) -> Progress:
    """Fill policy, optimiser and average from a checkpoint's `training/`, exactly.

    Raises TrainingError naming what is missing or left over.
    """
    path = folder / "training"
    try:
        facts = json.loads((path / "state.json").read_text())
        stored = load_file(path / "state.safetensors")
    except Exception as error:
        raise TrainingError(
            f"{path}: cannot read the training state ({error}); resume from an older checkpoint"
        ) from error
    if facts.get("format") != FORMAT:
        raise TrainingError(
            f"{path}: training state of format {facts.get('format')}, this vlafit reads {FORMAT}"
        )

    def take(key: str, like: Tensor) -> Tensor:
        if key not in stored:
            raise TrainingError(
                f"{path}: the training state lacks {key!r}; it belongs to another strategy or policy"
            )
        value = stored.pop(key)
        if value.shape != like.shape and value.ndim:
            raise TrainingError(
                f"{path}: {key!r} is {tuple(value.shape)}, the policy's is {tuple(like.shape)}"
            )
        return value

    names = {parameter: name for name, parameter in policy.named_parameters()}
    with torch.no_grad():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names[parameter]
                parameter.copy_(scatter_like(take(f"weight/{name}", parameter), parameter))
                if facts["step"] == 0:
                    continue  # no step taken yet: AdamW makes its states at the first one
                optimizer.state[parameter] = {
                    "step": take(f"adamw.step/{name}", torch.zeros(())),
                    "exp_avg": scatter_like(take(f"adamw.exp_avg/{name}", parameter), parameter),
                    "exp_avg_sq": scatter_like(take(f"adamw.exp_avg_sq/{name}", parameter), parameter),
                }
                if parameter.device.type != "cpu":  # a fused optimiser keeps its step beside the weights
                    optimizer.state[parameter]["step"] = optimizer.state[parameter]["step"].to(
                        parameter.device
                    )
        if ema is not None:
            ema.updates = int(facts["ema_updates"])
            for name, value in ema.average.items():
                value.copy_(scatter_like(take(f"ema/{name}", value), value))
    if stored:
        raise TrainingError(
            f"{path}: the training state holds more than the run trains: {sorted(stored)[:5]}"
        )
    return Progress(facts["step"], facts["seconds"], facts["best_loss"], facts["best_step"])


class Shelf:
    """The checkpoints of one run: written atomically, the newest, the best and the last few kept."""

    def __init__(self, run: Path, keep: int) -> None:
        self.folder = run / "checkpoints"
        self.keep = keep

    def path(self, step: int) -> Path:
        """Return the folder of the checkpoint of `step`."""
        return self.folder / f"step_{step:06d}"

    def steps(self) -> list[int]:
        """Return the steps of all complete checkpoints, oldest first."""
        return sorted(int(p.name[5:]) for p in self.folder.glob("step_*") if p.name[5:].isdigit())

    def resumable(self) -> Path | None:
        """Return the newest checkpoint that holds a training state."""
        found = [s for s in self.steps() if (self.path(s) / "training" / "state.json").is_file()]
        return self.path(found[-1]) if found else None

    def save(self, step: int, fill: Callable[[Path], None]) -> Path:
        """Write a checkpoint under a temporary name and rename it; a broken write leaves the older ones."""
        final = self.path(step)
        with files.new_folder(final) as folder:
            fill(folder)
        files.write_atomic(self.folder / "last.json", json.dumps({"step": step, "path": final.name}) + "\n")
        return final

    def point_best(self, step: int, loss: float) -> None:
        """Remember which checkpoint has the lowest validation loss."""
        facts = {"step": step, "path": self.path(step).name, "validation/loss": loss}
        files.write_atomic(self.folder / "best.json", json.dumps(facts) + "\n")

    def best_step(self) -> int | None:
        """Return the step that `best.json` points to."""
        pointer = self.folder / "best.json"
        return int(json.loads(pointer.read_text())["step"]) if pointer.is_file() else None

    def prune(self, always: set[int]) -> None:
        """Remove all but the newest `keep` checkpoints, the best one, and the steps in `always`."""
        steps = self.steps()
        kept = set(steps[-max(1, self.keep) :]) | always | {self.best_step()}
        for step in steps:
            if step not in kept:
                shutil.rmtree(self.path(step))


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
