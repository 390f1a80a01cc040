"""Write a dataset as HDF5 in LIBERO's layout: a file a task and sentence, frames contiguous and upright."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

from vlafit.datasets.convert.written import Written, card_for
from vlafit.datasets.hdf5_write import new_hdf5
from vlafit.datasets.store import EpisodeStore

STATE, ACTIONS = "obs/state", "actions"
ALL_AT_ONCE = 64  # frames held in memory


def write_libero(store: EpisodeStore, folder: Path, progress: Callable[[int], None]) -> Written:
    """Write the episodes into `folder`, those of a task in the order of the store."""
    groups: dict[tuple[str, str], list[int]] = {}
    for number, info in enumerate(store.episodes):
        groups.setdefault((info.task, info.instruction), []).append(number)
    names = _file_names([task for task, _ in groups])
    by_name = dict(zip(names, groups.items(), strict=True))
    done = 0
    for name in sorted(by_name):
        (task, sentence), numbers = by_name[name]
        with new_hdf5(folder / name) as file:
            data = file.create_group("data")
            data.attrs["env_name"] = task
            data.attrs["problem_info"] = json.dumps({"language_instruction": sentence})
            data.attrs["macros_image_convention"] = "opencv"  # upright
            data.attrs["num_demos"] = len(numbers)
            data.attrs["total"] = sum(store.episodes[number].length for number in numbers)
            for position, number in enumerate(numbers):
                done = _write_demo(data.create_group(f"demo_{position}"), store, number, progress, done)
    cameras = {camera.name: f"obs/{camera.name}_rgb" for camera in store.embodiment.cameras}
    card = card_for(store, "libero", cameras, STATE, ACTIONS, "attrs", store.card.record)
    order = tuple(number for name in sorted(by_name) for number in by_name[name][1])
    return Written(card, order, ())


def _write_demo(
    demo: h5py.Group, store: EpisodeStore, number: int, progress: Callable[[int], None], done: int
) -> int:
    info = store.episodes[number]
    demo.attrs["num_samples"] = info.length
    demo.attrs["source_episode"] = info.id
    if info.seed is not None:
        demo.attrs["seed"] = info.seed
    dones = np.zeros(info.length, np.uint8)
    dones[-1] = 1
    demo.create_dataset(ACTIONS, data=store.actions(number).astype(np.float64))  # LIBERO's width
    demo.create_dataset(STATE, data=store.state(number).astype(np.float64))
    demo.create_dataset("dones", data=dones)
    for camera in store.embodiment.cameras:
        shape = (info.length, *camera.shape)
        frames = demo.create_dataset(f"obs/{camera.name}_rgb", shape, np.uint8)
        for first in range(0, info.length, ALL_AT_ONCE):
            steps = range(first, min(first + ALL_AT_ONCE, info.length))
            frames[first : steps.stop] = store.images(number, steps, camera.name)
            done += len(steps)
            progress(done)
    return done


def _file_names(tasks: list[str]) -> list[str]:
    """Return a name of a file for each task, all different, of letters that every file system has."""
    names: list[str] = []
    for task in tasks:
        words = re.sub(r"[^A-Za-z0-9.-]+", "_", task).strip("_.-")[:80] or "task"
        name, number = f"{words}_demo.hdf5", 2
        while name.lower() in {taken.lower() for taken in names}:
            name, number = f"{words}_{number}_demo.hdf5", number + 1
        names.append(name)
    return names
