"""The checkpoints of one run on the disk: which there are, which stay."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from vlafit import files
from vlafit.errors import StorageError, TrainingError
from vlafit.train.checkpointer import found, resumable


class Shelf:
    """The checkpoints of one run: each written whole or not at all; the last, the best and some others stay.

    `keep` is how many stay beside the last and the best.
    """

    def __init__(self, run: Path, keep: int) -> None:
        self.folder = run / "checkpoints"
        self.keep = keep

    def path(self, step: int) -> Path:
        """Return the folder of the checkpoint of `step`."""
        return self.folder / f"step_{step:06d}"

    def steps(self) -> list[int]:
        """Return the steps of all complete checkpoints, oldest first."""
        return sorted(found(self.folder))

    def resumable(self, step: int | None = None) -> Path | None:
        """Return the newest checkpoint that holds a training state, or that of `step`.

        Raises TrainingError, naming those that there are, where there is none of `step`.
        """
        saved = resumable(self.folder)
        if step is None:
            return saved[max(saved)] if saved else None
        if step not in saved:
            there = f"those of steps {', '.join(map(str, sorted(saved)))}" if saved else "none"
            raise TrainingError(f"{self.folder} holds no training state of step {step}, but {there}")
        return saved[step]

    def drop_after(self, step: int) -> None:
        """Remove what was saved after `step`."""
        for later in self.steps():
            if later > step:
                self._remove(later)
        for pointer in ("best", "last"):
            path = self.folder / f"{pointer}.json"
            if path.is_file() and not (self.folder / json.loads(path.read_text("utf-8"))["path"]).is_dir():
                path.unlink()
        self._point("last", step)

    def tidy(self) -> None:
        """Clear away what a killed process left: half-written and half-removed checkpoints."""
        for path in self.folder.glob(".*step_*"):
            if path.is_dir():
                shutil.rmtree(path)
        resumable = self.resumable()
        if resumable is not None:
            self._point("last", int(resumable.name[5:]))

    def save(self, step: int, fill: Callable[[Path], None]) -> Path:
        """Write a checkpoint under a temporary name and rename it; a broken write leaves the older ones.

        Raises TrainingError where the disk is full, for example.
        """
        final = self.path(step)
        try:
            with files.new_folder(final) as folder:
                fill(folder)
        except StorageError as error:
            raise TrainingError(
                f"{final}: cannot write the checkpoint ({error}); mend that, and --resume goes on from the "
                "one before it"
            ) from error
        self._point("last", step)
        return final

    def point_best(self, step: int, loss: float) -> None:
        """Remember which checkpoint has the lowest validation loss; nothing happens if it is not there."""
        if self.path(step).is_dir():
            self._point("best", step, {"validation/loss": loss})

    def prune(self, best: int | None, always: set[int]) -> None:
        """Remove all but the last checkpoint, `keep` before it, the `best` one, and the steps in `always`."""
        steps = [step for step in self.steps() if step != best and step not in always]
        last = max(self.steps(), default=None)
        others = [step for step in steps if step != last]
        for step in others[: max(0, len(others) - self.keep)]:
            self._remove(step)

    def _remove(self, step: int) -> None:
        doomed = self.folder / f".{self.path(step).name}.removed"  # one that is half there looks like none
        os.rename(self.path(step), doomed)
        shutil.rmtree(doomed)

    def _point(self, name: str, step: int, more: Mapping[str, float] | None = None) -> None:
        facts = {"step": step, "path": self.path(step).name, **(more or {})}
        files.write_atomic(self.folder / f"{name}.json", json.dumps(facts) + "\n")
