"""What a run needs to go on as if it had never stopped: weights, optimiser, average, step, stage.

A checkpoint is a native one (what is evaluated and exported: the moving average where there is one) with a
folder `training/` beside it: the raw trainable weights, AdamW's states and where the run stands, as
safetensors and JSON. What is frozen, and the codec, come from the native part. Order, noise and time need no
state: they are functions of the step.

Format 1 had no stages, and one count for all averages; it is read still.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlafit import files
from vlafit.errors import TrainingError
from vlafit.train.distributed import gathered, scatter_like
from vlafit.train.stages import Place
from vlafit.train.train_state import Learner

FORMAT = 2
FACTS, TENSORS = "training/state.json", "training/state.safetensors"


@dataclass(frozen=True)
class Progress:
    """Where a run stands: steps done, seconds of training so far, the best validation loss, the stage."""

    step: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    stage: Place = field(default_factory=Place)


@dataclass(frozen=True)
class Saved:
    """What a checkpoint's `training/` holds."""

    folder: Path
    progress: Progress
    tensors: dict[str, Tensor]


def found(shelf: Path) -> dict[int, Path]:
    """Return the complete checkpoints in a run's folder of them, by step."""
    return {int(p.name[5:]): p for p in shelf.glob("step_*") if p.name[5:].isdigit()}


def resumable(shelf: Path) -> dict[int, Path]:
    """Return those that hold a training state, by step."""
    return {step: path for step, path in found(shelf).items() if (path / FACTS).is_file()}


def way_on(folder: Path) -> str:
    """Return how to go on where the checkpoint `folder` cannot be gone on from."""
    number = int(folder.name.removeprefix("step_"))
    earlier = [step for step in resumable(folder.parent) if step < number]
    if not earlier:
        return "there is no training state before it, so start anew with --out"
    step = max(earlier)
    return (
        f"the training state before it is {folder.parent / f'step_{step:06d}'}; the same command with "
        f"--resume-from {step} instead of --resume goes on from there, and removes what was saved later"
    )


def collect(learner: Learner, keep: bool) -> dict[str, Tensor]:
    """Return the whole training state by name, on the CPU. Every process must call it; see `gathered`."""
    names = {parameter: name for name, parameter in learner.policy.named_parameters()}
    tensors: dict[str, Tensor] = {}
    for parameter in learner.trainable:
        name = names[parameter]
        tensors[f"weight/{name}"] = parameter
        for key, value in learner.optimizer.state[parameter].items():
            tensors[f"adamw.{key}/{name}"] = value
    if learner.ema is not None:
        tensors |= {f"ema/{name}": value for name, value in learner.ema.average.items()}
        tensors |= {f"ema.updates/{name}": torch.tensor(float(n)) for name, n in learner.ema.updates.items()}
    if learner.ranks is not None:
        tensors |= {f"ranks/{name}": value for name, value in learner.ranks.state().items()}
    return gathered(tensors, keep)


def write(folder: Path, tensors: dict[str, Tensor], progress: Progress, data: str) -> None:
    """Write `training/` into a checkpoint that is still being made; `data` is the dataset's fingerprint."""
    (folder / "training").mkdir()
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / TENSORS)
    facts = {"format": FORMAT, "sha256": files.sha256(folder / TENSORS), "data": data, **asdict(progress)}
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def read(folder: Path, data: str) -> Saved:
    """Read and verify a checkpoint's `training/`; `data` is the dataset's fingerprint now.

    Raises TrainingError where it is damaged, of another version, or of other data.
    """
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        if facts["format"] not in (1, FORMAT):
            raise TrainingError(
                f"{folder / FACTS}: format {facts['format']!r}; this version reads {FORMAT} and 1: go on "
                "with the version that began the run, or start anew with --out"
            )
        tensors = load_file(folder / TENSORS)
        if files.sha256(folder / TENSORS) != facts["sha256"]:
            raise ValueError("state.safetensors is not the file that was saved")
        if facts["format"] == 1:
            count = torch.tensor(float(facts["ema_updates"] or 0))
            tensors |= {f"ema.updates/{k[4:]}": count for k in [*tensors] if k.startswith("ema/")}
            facts["stage"] = asdict(Place())
        found_data = facts["data"]
        told = {field.name: facts[field.name] for field in fields(Progress)}
        progress = Progress(**{**told, "stage": Place(**told["stage"])})
    except TrainingError:
        raise
    except Exception as error:  # of the file system, JSON or safetensors: the way out is the same
        raise TrainingError(
            f"{folder / 'training'}: cannot read the training state ({error!r}): {way_on(folder)}"
        ) from error
    if found_data != data:
        raise TrainingError(
            f"{folder}: the run began on other data: the episodes, their states, actions, instructions or "
            "their split are not the same now; bring the dataset back, or start anew with --out"
        )
    return Saved(folder, progress, tensors)


def restore(saved: Saved, learner: Learner) -> None:
    """Fill trainable weights, optimiser, average and ranks of the stage that was saved, exactly.

    Raises TrainingError naming what is missing or left over.
    """
    stored, where = dict(saved.tensors), saved.folder / TENSORS

    def take(key: str, like: Tensor) -> Tensor:
        if key not in stored:
            raise TrainingError(f"{where}: lacks {key!r}; it belongs to another strategy or policy")
        value = stored.pop(key)
        if value.shape != like.shape:
            shapes = f"{tuple(value.shape)}, the policy's is {tuple(like.shape)}"
            raise TrainingError(f"{where}: {key!r} is {shapes}")
        return scatter_like(value, like)

    names = {parameter: name for name, parameter in learner.policy.named_parameters()}
    with torch.no_grad():
        for parameter in learner.trainable:
            name = names[parameter]
            parameter.copy_(take(f"weight/{name}", parameter))
            # A fused optimiser keeps its count beside the weights, whole even where they are sharded.
            count = torch.zeros((), device=parameter.device)
            learner.optimizer.state[parameter] = {
                "step": take(f"adamw.step/{name}", count),
                "exp_avg": take(f"adamw.exp_avg/{name}", parameter),
                "exp_avg_sq": take(f"adamw.exp_avg_sq/{name}", parameter),
            }
        if learner.ema is not None:
            for name, value in learner.ema.average.items():
                value.copy_(take(f"ema/{name}", value))
                learner.ema.updates[name] = int(take(f"ema.updates/{name}", torch.tensor(0.0)))
    if learner.ranks is not None:
        scores = [key for key in stored if key.startswith("ranks/")]
        learner.ranks.load({key.removeprefix("ranks/"): stored.pop(key) for key in scores})
    if stored:
        raise TrainingError(
            f"{where}: holds more than this run trains: {', '.join(sorted(stored)[:5])}; it "
            "belongs to another strategy or policy"
        )
