"""Read the statistics that a LeRobot dataset states: meta/stats.json, or episodes_stats.jsonl of v2.1."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vlafit.datasets.card import RobotCard
from vlafit.datasets.lerobot.meta import Meta, read_json
from vlafit.datasets.recorded import MEASURES, Table, of_column, of_episodes
from vlafit.datasets.store import RecordedStatistics
from vlafit.errors import DataError, brief
from vlafit.files import parse_object, plain_text

WHOLE, BY_EPISODE = "meta/stats.json", "meta/episodes_stats.jsonl"


def read_statistics(meta: Meta, robot: RobotCard) -> RecordedStatistics:
    """Return what the dataset states of all its rows. Raises DataError for a file that is damaged.

    Statistics of episodes are joined as LeRobot does: by the number of their rows, without quantiles.
    """
    columns = {"state": robot.state, "action": robot.action}
    if (meta.root / WHOLE).is_file():
        path = meta.root / WHOLE
        stated = read_json(path)
        count = _count(stated, robot.action.keys[0])
        tables = {name: of_column(stated, column, str(path)) for name, column in columns.items()}
        return RecordedStatistics(WHOLE, count, tables)
    path = meta.root / BY_EPISODE
    if not path.is_file():
        return RecordedStatistics(reason=f"it has neither {WHOLE} nor {BY_EPISODE}")
    by_episode = _by_episode(meta)
    lacking = [entry.index for entry in meta.episodes if entry.index not in by_episode]
    if lacking:
        return RecordedStatistics(
            file=BY_EPISODE, reason=f"{BY_EPISODE} states nothing of episode {lacking[0]}"
        )
    joined: dict[str, Table] = {}
    for name, column in columns.items():
        each = [(e.length, of_column(by_episode[e.index], column, str(path))) for e in meta.episodes]
        whole = all(set(MEASURES) <= table.keys() for _, table in each)
        joined[name] = of_episodes(each) if whole else {}
    return RecordedStatistics(BY_EPISODE, sum(entry.length for entry in meta.episodes), joined)


def _by_episode(meta: Meta) -> dict[int, Mapping[str, Any]]:
    path, made = meta.root / BY_EPISODE, {}
    try:
        for line in plain_text(path).splitlines():
            if line.strip():
                values = parse_object(line)
                made[int(values["episode_index"])] = dict(values["stats"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot be read ({brief(error)}); fetch it again") from error
    return made


def _count(stated: Mapping[str, Any], key: str) -> int:
    feature = stated.get(key)
    try:
        return int(np.asarray(feature["count"]).reshape(-1)[0]) if isinstance(feature, Mapping) else 0
    except (KeyError, TypeError, ValueError, IndexError):
        return 0
