"""Where a recording goes: one HDF5 file a task in LIBERO's layout; until then a hidden folder of parts."""

import hashlib
import io
import json
import logging
import os
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from vlafit import files
from vlafit.errors import DataError
from vlafit.record.episode import Episode, is_perturbed
from vlafit.record.job import STATE_KEYS, Job
from vlafit.types import Embodiment, Env

log = logging.getLogger(__name__)

FRAMES_PER_CHUNK = 4  # of a compressed recording: a third smaller than with 1, and still quick to read singly


@dataclass(frozen=True)
class RecordedFile:
    """One task's file. `skipped` are the seeds that the expert failed."""

    path: Path
    task: str
    episodes: int
    frames: int
    skipped: tuple[int, ...]


class Folder:
    """Where a recording goes: one HDF5 file a task, and a hidden folder of finished episodes meanwhile."""

    def __init__(self, out: Path, job: Job, env: Env) -> None:
        self.out, self.job = out, job
        self.embodiment: Embodiment = env.embodiment
        self.instructions = {task: env.instruction(task) for task in job.record.tasks}
        self.settings: dict[str, Any] = {
            "type": "vlafit",
            "env_name": job.spec.name,
            "renderer": env.embodiment.renderer,
            "size": job.spec.size,
            "cameras": list(job.spec.cameras),
            "hz": env.embodiment.hz,
            "control": env.embodiment.control,
            "horizon": job.record.horizon,
            "hold_steps": job.record.hold_steps,
            "first_seed": job.record.first_seed,
            "perturbed": job.record.perturbed,
            "noise": job.record.noise,
            "versions": dict(env.versions),
        }
        text = json.dumps(self.settings, sort_keys=True)
        self.print = hashlib.sha256(text.encode()).hexdigest()[:16]  # names the settings
        self.parts = out / f".episodes-{self.print}"

    def file(self, task: str) -> Path:
        return self.out / f"{task}_demo.hdf5"

    def part(self, task: str, seed: int) -> Path:
        return self.parts / task / f"{seed}.npz"

    def prepare(self, resume: bool) -> None:
        """Make the folder, or raise DataError when something of an earlier recording is in the way."""
        files.require_writable(self.out)
        there = [self.file(task) for task in self.job.record.tasks if self.file(task).exists()]
        others = [path for path in sorted(self.out.glob(".episodes-*")) if path != self.parts]
        if not resume:
            begun = there + [path for path in (self.parts, *others) if path.exists()]
            if begun:
                raise DataError(
                    f"{self.out} holds a recording already ({begun[0].name}); go on with --resume, "
                    "or choose another folder, or delete it"
                )
        for path in others:
            log.warning(
                "%s holds episodes of a recording with other settings; delete it if it is not wanted", path
            )
        self.parts.mkdir(exist_ok=True)

    def clean(self) -> None:
        """Remove the hidden folder; every episode is in its file."""
        shutil.rmtree(self.parts, ignore_errors=True)

    def finished(self, task: str) -> RecordedFile | None:
        """Return what the file of `task` holds, or None. DataError when it is another recording's."""
        path = self.file(task)
        if not path.exists():
            return None
        try:
            with h5py.File(path, "r") as file:
                attrs: dict[str, Any] = dict(file["data"].attrs)
                same = (
                    attrs.get("recording") == self.print
                    and attrs["num_demos"] == self.job.record.episodes_per_task
                )
                found = RecordedFile(
                    path,
                    task,
                    int(attrs["num_demos"]),
                    int(attrs["total"]),
                    tuple(json.loads(attrs["skipped_seeds"])),
                )
        except (OSError, KeyError, ValueError) as error:
            raise DataError(
                f"{path}: is no recording of this card ({error}); move it away, or choose another folder"
            ) from error
        if not same:
            raise DataError(
                f"{path}: was recorded with other settings or another number of episodes; "
                "move it away, or choose another folder"
            )
        return found

    def save_part(self, task: str, seed: int, episode: Episode | None) -> bool:
        """Write an episode, or the mark that the expert failed; return whether it succeeded."""
        arrays: dict[str, Any] = {}
        if episode is not None:
            arrays = {"state": episode.state, "actions": episode.actions, "success": episode.success}
            arrays |= {f"image_{name}": frames for name, frames in episode.images.items()}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        files.write_atomic(self.part(task, seed), buffer.getvalue())
        return episode is not None

    def load_part(self, task: str, seed: int) -> Episode | None:
        """Read what `save_part` wrote."""
        path = self.part(task, seed)
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                if "state" not in arrays:
                    return None
                images = {name: arrays[f"image_{name}"] for name in self.job.spec.cameras}
                return Episode(arrays["state"], arrays["actions"], arrays["success"], images)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: cannot be read ({error}); delete it and resume") from error

    def played(self, task: str) -> dict[int, bool]:
        """Return the seeds of `task` played by an earlier call, and whether the expert succeeded."""
        outcomes = {}
        for path in sorted((self.parts / task).glob("*.npz")):
            try:
                with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                    outcomes[int(path.stem)] = "state" in arrays
            except (OSError, ValueError, zipfile.BadZipFile):
                log.warning("%s cannot be read; the episode is played again", path)
        return outcomes

    def write_file(self, task: str, outcomes: dict[int, bool]) -> RecordedFile:
        """Write the file of `task` from its parts, beside its place and then renamed into it."""
        path = self.file(task)
        partial = path.with_name(f".{path.name}.partial")
        try:
            frames = self._write(partial, task, outcomes)
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {error}; free some space and resume") from error
        finally:
            partial.unlink(missing_ok=True)
        shutil.rmtree(self.parts / task, ignore_errors=True)
        failed = tuple(seed for seed, good in sorted(outcomes.items()) if not good)
        return RecordedFile(path, task, len(outcomes) - len(failed), frames, failed)

    def _write(self, path: Path, task: str, outcomes: dict[int, bool]) -> int:
        good = [seed for seed, succeeded in sorted(outcomes.items()) if succeeded]
        total = 0
        with h5py.File(path, "w") as file:
            data = file.create_group("data")
            for index, seed in enumerate(good):
                episode = self.load_part(task, seed)
                if episode is None:
                    raise DataError(f"{self.part(task, seed)}: changed while recording; resume")
                total += self._write_demo(data.create_group(f"demo_{index}"), episode, seed)
            data.attrs["env_name"] = task
            data.attrs["problem_info"] = json.dumps({"language_instruction": self.instructions[task]})
            data.attrs["env_args"] = json.dumps(self.settings, sort_keys=True)
            data.attrs["macros_image_convention"] = "opencv"  # upright
            data.attrs["skipped_seeds"] = json.dumps(
                [s for s, succeeded in sorted(outcomes.items()) if not succeeded]
            )
            data.attrs["recording"] = self.print
            data.attrs["num_demos"] = len(good)
            data.attrs["total"] = total
        return total

    def _write_demo(self, demo: h5py.Group, episode: Episode, seed: int) -> int:
        steps = len(episode.actions)
        demo.attrs["num_samples"] = steps
        demo.attrs["seed"] = seed
        demo.attrs["perturbed"] = is_perturbed(self.job.record, seed)
        demo.attrs["expert"] = "scripted"
        dones = np.zeros(steps, np.uint8)
        dones[-1] = 1
        demo.create_dataset("actions", data=episode.actions.astype(np.float64))
        demo.create_dataset("rewards", data=episode.success.astype(np.uint8))
        demo.create_dataset("dones", data=dones)
        for name, frames in episode.images.items():
            packed: dict[str, Any] = {}
            if self.job.record.compress:
                chunk = (min(FRAMES_PER_CHUNK, steps), *frames.shape[1:])
                packed = {"compression": "gzip", "compression_opts": 9, "chunks": chunk}
            demo.create_dataset(f"obs/{name}_rgb", data=frames, **packed)
        demo.create_dataset(STATE_KEYS[0], data=episode.state[:, :3].astype(np.float64))
        demo.create_dataset(STATE_KEYS[1], data=episode.state[:, 3:].astype(np.float64))
        return steps
