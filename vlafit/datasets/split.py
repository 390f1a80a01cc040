"""Which episodes train and which validate: whole episodes, the same share of every task."""

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlafit.datasets.store import EpisodeInfo, EpisodeStore
from vlafit.errors import DataError


@dataclass(frozen=True)
class Group:
    """Episodes of which a share is held out."""

    name: str
    """The task; the instruction, where tasks of one episode share it; empty for `alone`."""
    ids: tuple[str, ...]
    alone: bool = False
    """Whether each is the only episode of its task and of its instruction."""


def groups_of(store: EpisodeStore) -> tuple[Group, ...]:
    """Return the episodes of each task, in the store's order.

    Layouts name tasks after files, and a file may be one episode. So tasks of one episode whose instruction
    is the same are one group, and those that then still have one episode are one group together.
    """
    tasks: dict[str, list[EpisodeInfo]] = {}
    for info in store.episodes:
        tasks.setdefault(info.task, []).append(info)
    groups: dict[tuple[str, str], list[str]] = {}
    single = {info.id for infos in tasks.values() if len(infos) == 1 for info in infos}
    sentences = Counter(info.instruction for info in store.episodes if info.id in single)
    for info in store.episodes:
        if info.id not in single:
            key = ("task", info.task)
        elif sentences[info.instruction] > 1:
            key = ("instruction", info.instruction)
        elif len(single) > 1:
            key = ("alone", "")
        else:
            key = ("task", info.task)
        groups.setdefault(key, []).append(info.id)
    return tuple(Group(name, tuple(ids), kind == "alone") for (kind, name), ids in groups.items())


def describe_groups(store: EpisodeStore) -> str:
    """Return how episodes that are the only ones of their task are held out; empty if there are none."""
    tasks = Counter(info.task for info in store.episodes)
    single = [task for task, count in tasks.items() if count == 1]
    if len(single) < 2:
        return ""
    alone = sum(len(group.ids) for group in groups_of(store) if group.alone)
    shared = len(single) - alone
    what = f"{len(single)} of {len(tasks)} tasks have one episode ({', '.join(single[:3])}"
    parts = []
    if shared:
        parts.append(
            f"{shared} of them share instructions, and the episodes of an instruction count as one task"
        )
    if alone == 1:
        parts.append("1 has an instruction of its own, and is trained on")
    elif alone:
        parts.append(
            f"{alone} have instructions of their own: data.validation holds out a share of these episodes, "
            "whose tasks are then not trained on"
        )
    return f"{what}{', ...' if len(single) > 3 else ''}): {'; '.join(parts)}"


def split_episodes(
    store: EpisodeStore, share: float, seed: int, per_task: int = 0
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the ids of (training, validation) episodes, in the store's order.

    Of each task's episodes, `share` validates (at least one, where the share is above 0 and the task has
    two), of tasks with one episode see `groups_of`: where all are alone, the share of them, rounded; the draw
    depends on the seed and the task alone. `per_task` caps the training episodes of each task
    (0: all) and leaves the validation episodes as they are. Raises DataError where a task would keep none.
    """
    if not 0 <= share < 1:
        raise DataError(f"the validation share must be from 0 to below 1, is {share}")
    if per_task < 0:
        raise DataError(f"episodes per task must be 0 (all) or more, is {per_task}")
    train: set[str] = set()
    held_out: set[str] = set()
    for group in groups_of(store):
        ids = group.ids
        draw = np.random.default_rng([seed, zlib.crc32(group.name.encode())])
        shuffled = [ids[i] for i in draw.permutation(len(ids))]
        least = 0 if group.alone else 1
        count = min(max(least, round(share * len(ids))), len(ids) - 1) if share > 0 else 0
        held_out.update(shuffled[:count])
        train.update(shuffled[count:][: None if group.alone else per_task or None])
    order = [info.id for info in store.episodes]
    return tuple(i for i in order if i in train), tuple(i for i in order if i in held_out)


def episodes_hash(store: EpisodeStore, training: Sequence[str], validation: Sequence[str]) -> str:
    """Return a hash of the split and of the states, actions and instructions of its episodes.

    Images are left out, because they would have to be read completely.
    """
    digest = hashlib.sha256()
    for split in (training, validation):
        digest.update(f"{len(split)} episodes".encode())
        for identity in split:
            number = store.index(identity)
            info, state, actions = store.episodes[number], store.state(number), store.actions(number)
            header = [info.id, info.task, info.instruction, info.length, state.shape, actions.shape]
            digest.update(json.dumps(header).encode())
            digest.update(np.ascontiguousarray(state).data)
            digest.update(np.ascontiguousarray(actions).data)
    return digest.hexdigest()
