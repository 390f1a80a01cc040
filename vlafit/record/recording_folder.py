"""Write a recording: finished episodes in a hidden folder, then one HDF5 file per task in LIBERO's layout."""

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
from vlafit.datasets.hdf5_write import new_hdf5
from vlafit.errors import DataError, StorageError
from vlafit.record.episode import Episode, is_perturbed
from vlafit.record.plan import STATE_ENDS, RecordingPlan
from vlafit.types import Embodiment, Env

log = logging.getLogger(__name__)

FRAMES_PER_CHUNK = 4  # of a compressed recording: a third smaller than with 1, still fast for single frames


@dataclass(frozen=True)
class RecordedFile:
    """One task's file. `skipped` are the seeds that the expert did not solve."""

    path: Path
    task: str
    episodes: int
    frames: int
    skipped: tuple[int, ...]


class RecordingFolder:
    """A recording's folder: one HDF5 file per task, and a hidden folder of finished episodes until then."""

    def __init__(self, out: Path, plan: RecordingPlan, env: Env) -> None:
        self.out, self.plan = out, plan
        self.embodiment: Embodiment = env.embodiment
        self.instructions = {task: env.instruction(task) for task in plan.record.tasks}
        self.settings: dict[str, Any] = {
            "type": "vlafit",
            "env_name": plan.spec.name,
            "renderer": env.embodiment.renderer,
            "size": plan.spec.size,
            "cameras": list(plan.spec.cameras),
            "hz": env.embodiment.hz,
            "control": env.embodiment.control,
            "horizon": plan.record.horizon,
            "hold_steps": plan.record.hold_steps,
            "first_seed": plan.record.first_seed,
            "perturbed": plan.record.perturbed,
            "noise": plan.record.noise,
            "versions": dict(env.versions),
        }
        if plan.record.keep:  # added later: recordings without are those of earlier versions
            self.settings["keep"] = plan.record.keep
        turned = sorted(camera.name for camera in plan.cameras if camera.rotate)
        if turned:
            self.settings["turned"] = turned
        text = json.dumps(self.settings, sort_keys=True)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]  # of the settings
        self.parts = out / f".episodes-{self.fingerprint}"

    def file(self, task: str) -> Path:
        return self.out / f"{task}_demo.hdf5"

    def part(self, task: str, seed: int) -> Path:
        return self.parts / task / f"{seed}.npz"

    def prepare(self, resume: bool) -> None:
        """Create the folder. Without `resume`, raises DataError if it holds an earlier recording."""
        files.require_writable(self.out)
        finished = [self.file(task) for task in self.plan.record.tasks if self.file(task).exists()]
        others = [path for path in sorted(self.out.glob(".episodes-*")) if path != self.parts]
        if not resume:
            existing = finished + [path for path in (self.parts, *others) if path.exists()]
            if existing:
                raise DataError(
                    f"{self.out} already holds a recording ({existing[0].name}); continue with --resume, "
                    "choose another folder, or delete it"
                )
        for path in others:
            log.warning(
                "%s holds episodes of a recording with other settings; delete it if you do not need it", path
            )
        files.require_writable(self.parts)
        for task in self.plan.record.tasks:
            files.tidy(self.parts / task)

    def clean(self) -> None:
        """Remove the hidden folder once every episode is in its file."""
        shutil.rmtree(self.parts, ignore_errors=True)

    def finished(self, task: str) -> RecordedFile | None:
        """Return the finished file of `task`, or None. Raises DataError for another recording's file."""
        path = self.file(task)
        if not path.exists():
            return None
        try:
            with h5py.File(path, "r") as file:
                attrs: dict[str, Any] = dict(file["data"].attrs)
                same = (
                    attrs.get("recording") == self.fingerprint
                    and attrs["num_demos"] == self.plan.record.episodes_per_task
                )
                recorded = RecordedFile(
                    path,
                    task,
                    int(attrs["num_demos"]),
                    int(attrs["total"]),
                    tuple(json.loads(attrs["skipped_seeds"])),
                )
        except (OSError, KeyError, ValueError) as error:
            raise DataError(
                f"{path}: not a recording of this card ({error}); move it away, or choose another folder"
            ) from error
        if not same:
            raise DataError(
                f"{path}: was recorded with other settings or another number of episodes; "
                "move it away, or choose another folder"
            )
        return recorded

    def save_part(self, task: str, seed: int, episode: Episode | None) -> bool:
        """Write an episode, or an empty file if the expert failed; return whether it succeeded."""
        arrays: dict[str, Any] = {}
        if episode is not None:
            arrays = {"state": episode.state, "actions": episode.actions, "success": episode.success}
            arrays |= {f"image_{name}": frames for name, frames in episode.images.items()}
            arrays |= {f"kept_{index}": values for index, values in enumerate(episode.kept.values())}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        files.write_atomic(self.part(task, seed), buffer.getvalue())
        return episode is not None

    def load_part(self, task: str, seed: int) -> Episode | None:
        """Read an episode written by `save_part`; None if the expert failed."""
        path = self.part(task, seed)
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                if "state" not in arrays:
                    return None
                images = {name: arrays[f"image_{name}"] for name in self.plan.spec.cameras}
                kept = {name: arrays[f"kept_{index}"] for index, name in enumerate(self.plan.record.keep)}
                return Episode(arrays["state"], arrays["actions"], arrays["success"], images, kept)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: cannot be read ({error}); delete it and resume") from error

    def played(self, task: str) -> dict[int, bool]:
        """Return the seeds of `task` that an earlier call ran, and whether the expert succeeded."""
        outcomes = {}
        for path in sorted((self.parts / task).glob("*.npz")):
            try:
                with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                    outcomes[int(path.stem)] = "state" in arrays
            except (OSError, ValueError, zipfile.BadZipFile):
                log.warning("%s cannot be read; the episode is recorded again", path)
        return outcomes

    def write_file(self, task: str, outcomes: dict[int, bool]) -> RecordedFile:
        """Write the file of `task` from its episodes, atomically."""
        path = self.file(task)
        partial = path.with_name(f".{path.name}.partial")
        try:
            frames = self._write(partial, task, outcomes)
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        except (OSError, StorageError) as error:
            raise DataError(
                f"{path}: cannot be written ({error}); its episodes are kept: once there is space, continue "
                "with --resume"
            ) from error
        finally:
            partial.unlink(missing_ok=True)
        shutil.rmtree(self.parts / task, ignore_errors=True)
        failed = tuple(seed for seed, good in sorted(outcomes.items()) if not good)
        return RecordedFile(path, task, len(outcomes) - len(failed), frames, failed)

    def _write(self, path: Path, task: str, outcomes: dict[int, bool]) -> int:
        good = [seed for seed, succeeded in sorted(outcomes.items()) if succeeded]
        total = 0
        with new_hdf5(path) as file:
            data = file.create_group("data")
            for index, seed in enumerate(good):
                episode = self.load_part(task, seed)
                if episode is None:
                    raise DataError(f"{self.part(task, seed)}: changed while recording; resume")
                total += self._write_demo(data.create_group(f"demo_{index}"), episode, seed)
            data.attrs["env_name"] = task
            data.attrs["problem_info"] = json.dumps({"language_instruction": self.instructions[task]})
            data.attrs["env_args"] = json.dumps(self.settings, sort_keys=True)
            turned = any(camera.rotate for camera in self.plan.cameras)
            data.attrs["macros_image_convention"] = (
                "opengl" if turned else "opencv"
            )  # upside-down, or upright
            data.attrs["skipped_seeds"] = json.dumps(
                [s for s, succeeded in sorted(outcomes.items()) if not succeeded]
            )
            data.attrs["recording"] = self.fingerprint
            data.attrs["num_demos"] = len(good)
            data.attrs["total"] = total
        return total

    def _write_demo(self, demo: h5py.Group, episode: Episode, seed: int) -> int:
        steps = len(episode.actions)
        demo.attrs["num_samples"] = steps
        demo.attrs["seed"] = seed
        demo.attrs["perturbed"] = is_perturbed(self.plan.record, seed)
        demo.attrs["expert"] = "scripted"
        dones = np.zeros(steps, np.uint8)
        dones[-1] = 1
        demo.create_dataset("actions", data=episode.actions.astype(np.float64))
        demo.create_dataset("rewards", data=episode.success.astype(np.uint8))
        demo.create_dataset("dones", data=dones)
        for camera in self.plan.cameras:
            frames = episode.images[camera.name]
            packed: dict[str, Any] = {}
            if self.plan.record.compress:
                chunk = (min(FRAMES_PER_CHUNK, steps), *frames.shape[1:])
                packed = {"compression": "gzip", "compression_opts": 9, "chunks": chunk}
            stored = np.ascontiguousarray(frames[:, ::-1, ::-1]) if camera.rotate else frames
            demo.create_dataset(camera.key, data=stored, **packed)
        begin = 0
        for key, end in zip(self.plan.state_keys, STATE_ENDS[self.plan.state_keys], strict=True):
            demo.create_dataset(key, data=episode.state[:, begin:end].astype(np.float64))
            begin = end
        for name, values in episode.kept.items():
            demo.create_dataset(name, data=values)
        return steps
