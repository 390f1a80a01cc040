"""Statistics of state and action, kept on disk under a hash of the rows that they are taken from."""

import hashlib
import json
import logging
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from vlafit.codec.columns import Columns
from vlafit.codec.statistics import Statistics
from vlafit.datasets.hdf5_index import folder
from vlafit.datasets.statistics import blocks_for_statistics
from vlafit.datasets.store import EpisodeStore
from vlafit.errors import CodecError, VlafitError
from vlafit.files import is_reachable_file, parse_json, plain_text, write_atomic

log = logging.getLogger(__name__)

FEWEST_ROWS = 200_000  # of states and actions: below, taking statistics costs about as much as the hash


def statistics_of(
    stores: Sequence[EpisodeStore],
    episode_ids: Sequence[Sequence[str]],
    chunk: int,
    relative: Sequence[bool] = (),
    columns: Columns | None = None,
) -> dict[str, Statistics]:
    """Return the statistics of "state" and "action" of the given (training) episodes, as they are learned.

    They are kept under a hash of every value that they are taken from, so that a run over many episodes, and
    each resume of it, only reads the columns once. Raises as `blocks_for_statistics` does.
    """
    states, actions = blocks_for_statistics(stores, episode_ids, chunk, relative, columns)
    learned = columns or Columns(stores[0].embodiment, relative)
    steps = [s.episodes[s.index(i)].length for s, ids in zip(stores, episode_ids, strict=True) for i in ids]
    rows = sum(steps) + sum(steps) * (chunk if learned.is_relative else 1)
    place = folder() if rows >= FEWEST_ROWS else None
    path = None
    if place is not None:
        key = _content_hash(stores, episode_ids, chunk, learned)
        path = place.with_name("statistics") / f"{key}.json"
        kept = _kept(path) if is_reachable_file(path) else None
        if kept is not None:
            return kept
    made = {
        "state": Statistics.of_blocks(states, "state", learned.state_labels),
        "action": Statistics.of_blocks(actions, "action", learned.action_labels),
    }
    if path is not None:
        try:
            write_atomic(path, json.dumps({name: values.to_json() for name, values in made.items()}))
        except VlafitError as error:  # only costs time
            log.warning("statistics cannot be kept (%s)", error)
    return made


def _content_hash(
    stores: Sequence[EpisodeStore], episode_ids: Sequence[Sequence[str]], chunk: int, columns: Columns
) -> str:
    """Return a hash of everything that decides the statistics: the rows, and what is learned of them."""
    windows = [chunk] * columns.is_relative + columns.settings
    digest = hashlib.sha256(json.dumps([version("vlafit"), np.__version__, windows]).encode())
    for store, ids in zip(stores, episode_ids, strict=True):
        for identity in ids:
            episode = store.index(identity)
            for rows in (store.state(episode), store.actions(episode)):
                digest.update(repr(rows.shape).encode())
                digest.update(np.ascontiguousarray(rows).data)
    return digest.hexdigest()


def _kept(path: Path) -> dict[str, Statistics] | None:
    try:
        values = parse_json(plain_text(path))
        return {name: Statistics.from_json(values[name], f"{path}: {name}") for name in ("state", "action")}
    except (OSError, ValueError, KeyError, TypeError, CodecError) as error:
        log.warning("%s: is damaged (%s), so statistics are taken again", path, error)
        return None
