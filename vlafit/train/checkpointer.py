"""Save, find, prune and restore a run's checkpoints, so that a resumed run is bit-identical.

A checkpoint is a native one (what is evaluated and exported: the EMA, if there is one) with a folder
`training/` in it: the raw trainable weights, AdamW's states and the run's progress, as safetensors and JSON.
Frozen weights and the codec come from the native part. Sample order and noise need no state: they are
functions of the step.

Format 1 had no stages, and one update count for the whole EMA; it can still be read.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlafit import config, files
from vlafit.errors import StorageError, TrainingError, brief
from vlafit.files import parse_json, plain_text
from vlafit.train.distributed import gathered, scatter_like
from vlafit.train.optim import empty_state
from vlafit.train.stages import Place
from vlafit.train.train_state import TrainState

FORMAT = 2
FACTS, TENSORS = "training/state.json", "training/state.safetensors"
AVERAGE = "ema/"  # and a parameter's name, in TENSORS
OWN_HASH = "facts_sha256"
"""Key of the hash of everything else in state.json; checkpoints of early versions have none."""


@dataclass(frozen=True)
class Progress:
    """Finished steps, seconds, best validation loss and stage; saved with every checkpoint."""

    step: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    stage: Place = field(default_factory=Place)


@dataclass(frozen=True)
class Saved:
    """The contents of a checkpoint's `training/`."""

    folder: Path
    progress: Progress
    tensors: Mapping[str, Tensor]


@final
class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read into memory of its own whenever it is asked for.

    A file that is mapped into memory would stay there whole for as long as a tensor of it is used.
    """

    def __init__(self, path: Path) -> None:
        files.require_readable(path)
        self._file = safe_open(path, framework="pt", backend="pread")
        self._names = frozenset(self._file.keys())
        self._added: dict[str, Tensor] = {}

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add tensors that are not in the file."""
        self._added |= tensors

    def __getitem__(self, name: str) -> Tensor:
        if name in self._added:
            return self._added[name]
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names | self._added.keys()))

    def __len__(self) -> int:
        return len(self._names | self._added.keys())


# ------------------------------------------------------------------------------ the checkpoints of a run


def complete(folder: Path) -> dict[int, Path]:
    """Return the complete checkpoints in a run's checkpoint folder, by step."""
    return {int(p.name[5:]): p for p in folder.glob("step_*") if p.name[5:].isdecimal()}


def resumable(folder: Path) -> dict[int, Path]:
    """Return those that hold a training state, by step."""
    return {step: path for step, path in complete(folder).items() if (path / FACTS).is_file()}


def how_to_resume(checkpoint: Path) -> str:
    """Return how to continue a run whose checkpoint `checkpoint` cannot be resumed."""
    number = int(checkpoint.name.removeprefix("step_"))
    earlier = [step for step in resumable(checkpoint.parent) if step < number]
    if not earlier:
        return "there is no earlier training state, so start a new run with --out"
    step = max(earlier)
    return (
        f"the previous training state is {checkpoint.parent / f'step_{step:06d}'}; to resume from it, run "
        f"the same command with --resume-from {step} instead of --resume (later checkpoints are removed)"
    )


@final
class CheckpointManager:
    """The checkpoint folder of one run. Writes are atomic; the last, the best and `keep` others are kept."""

    def __init__(self, run: Path, keep: int) -> None:
        self.folder = run / "checkpoints"
        self.keep = keep

    def path(self, step: int) -> Path:
        """Return the folder of the checkpoint of `step`."""
        return self.folder / f"step_{step:06d}"

    def steps(self) -> list[int]:
        """Return the steps of all complete checkpoints, oldest first."""
        return sorted(complete(self.folder))

    def resumable(self, step: int | None = None) -> Path | None:
        """Return the newest checkpoint that holds a training state, or that of `step`.

        Raises TrainingError naming the steps that can be resumed, if `step` cannot.
        """
        saved = resumable(self.folder)
        if step is None:
            return saved[max(saved)] if saved else None
        if step not in saved:
            available = f"available: {', '.join(map(str, sorted(saved)))}" if saved else "there are none"
            raise TrainingError(f"{self.folder} has no training state of step {step}; {available}")
        return saved[step]

    def drop_after(self, step: int) -> None:
        """Remove the checkpoints after `step`."""
        for later in self.steps():
            if later > step:
                self._remove(later)
        for pointer in ("best", "last"):
            path = self.folder / f"{pointer}.json"
            if path.is_file() and not self._leads(path):
                path.unlink()
        self._point("last", step)

    def _leads(self, pointer: Path) -> bool:
        """Whether a pointer names a checkpoint that is there; one that is damaged does not."""
        try:
            return (self.folder / parse_json(plain_text(pointer))["path"]).is_dir()
        except (ValueError, KeyError, TypeError):
            return False

    def tidy(self) -> None:
        """Remove half-written and half-removed checkpoints of a killed process."""
        for folder in (self.folder.parent, self.folder):
            files.tidy(folder)
        newest = self.resumable()
        if newest is not None:
            self._point("last", int(newest.name[5:]))

    def save(self, step: int, fill: Callable[[Path], None]) -> Path:
        """Let `fill` write a checkpoint into a temporary folder, and rename it when it is complete.

        Raises TrainingError if the disk is full, for example; older checkpoints are kept.
        """
        final = self.path(step)
        try:
            with files.new_folder(final) as folder:
                fill(folder)
        except StorageError as error:
            raise TrainingError(
                f"{final}: cannot write the checkpoint ({error}); fix that, then --resume continues from the "
                "previous one"
            ) from error
        self._point("last", step)
        return final

    def mark_best(self, step: int, loss: float) -> None:
        """Record that the checkpoint of `step`, if it exists, has the lowest validation loss."""
        if self.path(step).is_dir():
            self._point("best", step, {"validation/loss": loss})

    def prune(self, best: int | None, always: set[int]) -> None:
        """Remove all but the last checkpoint, `keep` before it, the `best`, and the steps in `always`."""
        steps = [step for step in self.steps() if step != best and step not in always]
        last = max(self.steps(), default=None)
        others = [step for step in steps if step != last]
        for step in others[: max(0, len(others) - self.keep)]:
            self._remove(step)

    def _remove(self, step: int) -> None:
        removed = self.folder / f".{self.path(step).name}.removed"  # a half-removed folder is never listed
        os.rename(self.path(step), removed)
        shutil.rmtree(removed)

    def _point(self, name: str, step: int, more: Mapping[str, float] | None = None) -> None:
        facts = {"step": step, "path": self.path(step).name, **(more or {})}
        files.write_atomic(self.folder / f"{name}.json", json.dumps(facts) + "\n")


# -------------------------------------------------------------------------------------- training state


def collect(state: TrainState, keep: bool) -> dict[str, Tensor]:
    """Return all training tensors by name, on the CPU. Every process must call it; see `gathered`."""
    names = {parameter: name for name, parameter in state.policy.named_parameters()}
    tensors: dict[str, Tensor] = {}
    averages = state.ema.gathered(keep) if state.ema is not None else {}
    for parameter in state.trainable:
        name = names[parameter]
        tensors[f"weight/{name}"] = parameter
        for key, value in state.optimizer.state[parameter].items():
            tensors[f"adamw.{key}/{name}"] = value
    if state.ema is not None:
        tensors |= {f"ema.updates/{name}": torch.tensor(float(n)) for name, n in state.ema.updates.items()}
    if state.ranks is not None:
        tensors |= {f"ranks/{name}": value for name, value in state.ranks.state().items()}
    return {**gathered(tensors, keep), **{f"{AVERAGE}{name}": value for name, value in averages.items()}}


def averages_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the averages among collected training tensors, by parameter."""
    return {key.removeprefix(AVERAGE): value for key, value in tensors.items() if key.startswith(AVERAGE)}


def write(folder: Path, tensors: dict[str, Tensor], progress: Progress, data: str) -> None:
    """Write `training/` into an unfinished checkpoint; `data` is the dataset's fingerprint."""
    (folder / "training").mkdir()
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / TENSORS)
    facts = {"format": FORMAT, "sha256": files.sha256(folder / TENSORS), "data": data, **asdict(progress)}
    facts[OWN_HASH] = files.sha256_of_json(facts)
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def read(folder: Path, data: str) -> Saved:
    """Read and verify a checkpoint's `training/`; `data` is the dataset's current fingerprint.

    Raises TrainingError if it is damaged, of another version, or of other data.
    """
    for name in (FACTS, TENSORS):
        files.require_readable(folder / name)
    try:
        facts = parse_json(plain_text(folder / FACTS))
        if facts["format"] not in (1, FORMAT):
            raise TrainingError(
                f"{folder / FACTS}: format {facts['format']!r}; this version reads {FORMAT} and 1: resume "
                "with the version that began the run, or start a new run with --out"
            )
        tensors = StoredTensors(folder / TENSORS)
        if files.sha256(folder / TENSORS) != facts["sha256"]:
            raise ValueError("the hash of state.safetensors differs from state.json")
        if OWN_HASH in facts and facts.pop(OWN_HASH) != files.sha256_of_json(facts):
            raise ValueError(f"the numbers in state.json are not those that were saved ({OWN_HASH} differs)")
        if facts["format"] == 1:
            count = torch.tensor(float(facts["ema_updates"] or 0))
            tensors.add({f"ema.updates/{k[4:]}": count for k in tensors if k.startswith("ema/")})
            facts["stage"] = asdict(Place())
            del facts["ema_updates"]
        saved_data = facts.pop("data")
        values = {key: value for key, value in facts.items() if key not in ("format", "sha256")}
        progress = config.build(Progress, values, "state.json")
        _require_consistent(progress, folder, tensors)
    except TrainingError:
        raise
    except Exception as error:  # of the file system, JSON or safetensors: the remedy is the same
        raise TrainingError(
            f"{folder / 'training'}: cannot read the training state ({brief(error)}): {how_to_resume(folder)}"
        ) from error
    if saved_data != data:
        raise TrainingError(
            f"{folder}: the data changed since the run began (episodes, states, actions, instructions or "
            "split); restore the dataset, or start a new run with --out"
        )
    return Saved(folder, progress, tensors)


def _require_consistent(progress: Progress, folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the finished steps are those of the folder's name and of AdamW's counts."""
    step, stage = progress.step, progress.stage
    if folder.name.removeprefix("step_").isdecimal() and step != int(folder.name.removeprefix("step_")):
        raise ValueError(f"state.json says step {step}, the folder's name is {folder.name}")
    counts = [int(tensors[key].max()) for key in tensors if key.startswith("adamw.step/")]
    if counts and (max(counts) > step or (stage.number == 0 and max(counts) != step)):
        raise ValueError(f"state.json says step {step}, the optimiser counts {max(counts)} updates")
    if stage.number < 0 or not 0 <= stage.began <= step or stage.stalled < 0:
        raise ValueError(f"state.json says stage {stage} at step {step}")
    if progress.best_step is not None and not 0 <= progress.best_step <= step:
        raise ValueError(f"state.json says best_step {progress.best_step} at step {step}")


def restore(saved: Saved, state: TrainState) -> None:
    """Restore trainable weights, optimiser, EMA and ranks of the saved stage, exactly.

    Raises TrainingError naming what is missing or unused.
    """
    unused, where = set(saved.tensors), saved.folder / TENSORS

    def use(key: str) -> None:
        if key not in unused:
            raise TrainingError(
                f"{where}: {key!r} is missing; the file belongs to another strategy or policy"
            )
        unused.remove(key)

    def take(key: str, like: Tensor) -> Tensor:
        use(key)
        value = saved.tensors[key]
        if value.shape != like.shape:
            shapes = f"{tuple(value.shape)}, but {tuple(like.shape)} in the policy"
            raise TrainingError(f"{where}: {key!r} has shape {shapes}")
        return scatter_like(value, like)

    names = {parameter: name for name, parameter in state.policy.named_parameters()}
    with torch.no_grad():
        for parameter in state.trainable:
            name = names[parameter]
            parameter.copy_(take(f"weight/{name}", parameter))
            empty = empty_state(state.optimizer, parameter)
            state.optimizer.state[parameter] = {
                key: take(f"adamw.{key}/{name}", like) for key, like in empty.items()
            }
        if state.ema is not None:
            for name in state.ema.updates:
                if (value := state.ema.average.get(name)) is not None:
                    value.copy_(take(f"{AVERAGE}{name}", value))
                else:  # another process keeps it
                    use(f"{AVERAGE}{name}")
                state.ema.updates[name] = int(take(f"ema.updates/{name}", torch.tensor(0.0)))
    if state.ranks is not None:
        scores = [key for key in unused if key.startswith("ranks/")]
        state.ranks.load({key.removeprefix("ranks/"): saved.tensors[key] for key in scores})
        unused.difference_update(scores)
    if unused:
        raise TrainingError(
            f"{where}: tensors that this run does not train: {', '.join(sorted(unused)[:5])}; the file "
            "belongs to another strategy or policy"
        )
