"""What a run needs to go on as if it had never stopped: weights, optimiser, average, step.

A checkpoint is a native one (what is evaluated and exported: the moving average where there is one) with a
folder `training/` beside it: the raw trainable weights, AdamW's states and the step, as safetensors and JSON.
What is frozen, and the codec, come from the native part. Order, noise and time need no state: they are
functions of the step.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlafit import files
from vlafit.errors import TrainingError
from vlafit.train.optim import Ema
from vlafit.train.parallel import gathered, scatter_like

FORMAT = 1
FACTS, TENSORS = "training/state.json", "training/state.safetensors"


@dataclass(frozen=True)
class Progress:
    """Where a run stands: optimiser steps done, seconds of training so far, the best validation loss."""

    step: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None


def collect(
    policy: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None, keep: bool
) -> dict[str, Tensor]:
    """Return the whole training state by name, on the CPU. Every process must call it; see `gathered`."""
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
    return gathered(tensors, keep)


def write(folder: Path, tensors: dict[str, Tensor], progress: Progress, ema: Ema | None, data: str) -> None:
    """Write `training/` into a checkpoint that is still being made; `data` is the dataset's fingerprint."""
    (folder / "training").mkdir()
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / TENSORS)
    facts = {
        "format": FORMAT,
        "sha256": files.sha256(folder / TENSORS),
        "data": data,
        "ema_updates": ema.updates if ema else None,
        **asdict(progress),
    }
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def restore(
    folder: Path, policy: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None, data: str
) -> Progress:
    """Fill the trainable weights, optimiser and average from a checkpoint's `training/`, exactly.

    Raises TrainingError naming what is missing, left over or not of the dataset `data`.
    """
    facts, stored = _read(folder)
    if facts["data"] != data:
        raise TrainingError(
            f"{folder}: the run began on other data: the episodes, their states, actions, instructions or "
            "their split are not the same now; bring the dataset back, or start anew with --out"
        )

    def take(key: str, like: Tensor) -> Tensor:
        if key not in stored:
            raise TrainingError(
                f"{folder / TENSORS}: lacks {key!r}; it belongs to another strategy or policy"
            )
        value = stored.pop(key)
        if value.shape != like.shape:
            shapes = f"{tuple(value.shape)}, the policy's is {tuple(like.shape)}"
            raise TrainingError(f"{folder / TENSORS}: {key!r} is {shapes}")
        return scatter_like(value, like)

    names = {parameter: name for name, parameter in policy.named_parameters()}
    with torch.no_grad():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names[parameter]
                parameter.copy_(take(f"weight/{name}", parameter))
                # A fused optimiser keeps its count beside the weights, whole even where they are sharded.
                count = torch.zeros((), device=parameter.device)
                optimizer.state[parameter] = {
                    "step": take(f"adamw.step/{name}", count),
                    "exp_avg": take(f"adamw.exp_avg/{name}", parameter),
                    "exp_avg_sq": take(f"adamw.exp_avg_sq/{name}", parameter),
                }
        if ema is not None:
            ema.updates = int(facts["ema_updates"])
            for name, value in ema.average.items():
                value.copy_(take(f"ema/{name}", value))
    if stored:
        raise TrainingError(
            f"{folder / TENSORS}: holds more than this run trains: {', '.join(sorted(stored)[:5])}; it "
            "belongs to another strategy or policy"
        )
    return Progress(**{field.name: facts[field.name] for field in fields(Progress)})


def _read(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS)
        lacking = {"format", "sha256", "data", "ema_updates", *(f.name for f in fields(Progress))} - set(
            facts
        )
        if lacking:
            raise ValueError(f"state.json lacks {', '.join(sorted(lacking))}")
        if files.sha256(folder / TENSORS) != facts["sha256"]:
            raise ValueError("state.safetensors is not the file that was saved")
    except Exception as error:  # of the file system, JSON or safetensors: the way out is the same
        raise TrainingError(
            f"{folder / 'training'}: cannot read the training state ({error}); remove the folder {folder} to "
            "resume from the checkpoint before it"
        ) from error
    if facts["format"] != FORMAT:
        raise TrainingError(f"{folder / FACTS}: format {facts['format']!r}; this version reads {FORMAT}")
    return facts, tensors
