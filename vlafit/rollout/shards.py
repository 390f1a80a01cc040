"""Merge what several machines played of one evaluation into the evaluation of one machine.

Machine i of n evaluates with `--shard i/n`: it plays every n-th start, in the folder shard-i-of-n of the
evaluation's. An episode depends on nothing but its own task and seed, so the merged folder is that of an
evaluation on one machine, but for the times.
"""

import re
import shutil
from pathlib import Path
from typing import Any

from vlafit.errors import ConfigError
from vlafit.rollout.evaluation_folder import EvaluationFolder, Result
from vlafit.rollout.records import Record
from vlafit.rollout.shard import Shard

FOLDER = re.compile(r"shard-(\d+)-of-(\d+)")


def merge(out: Path) -> Result:
    """Merge the shards in the folder `out` into the evaluation that they are shares of.

    Raises ConfigError if a shard or an episode is missing, or the shards are not of one evaluation: another
    policy, protocol, device, or other versions of the software.
    """
    folders = {Shard(int(m[1]), int(m[2])): path for path, m in _named(out)}
    if not folders:
        raise ConfigError(f"{out}: holds no folder shard-1-of-N; evaluate with --out {out} --shard 1/N first")
    counts = sorted({shard.count for shard in folders})
    if len(counts) > 1:
        raise ConfigError(f"{out}: holds shards of {counts[0]} and of {counts[1]}; remove those of one")
    wanted = [Shard(number, counts[0]) for number in range(1, counts[0] + 1)]
    missing = [shard.folder for shard in wanted if shard not in folders]
    if missing:
        raise ConfigError(f"{out}: {', '.join(missing)} is missing; evaluate it, then merge again")
    shards = [_read(folders[shard]) for shard in wanted]
    identity, environment = _same(shards)
    records: dict[tuple[str, int], Record] = {}
    for shard in shards:
        kept = shard.records()
        shard.require_counted(kept)
        records |= {(record.task, record.seed): record for record in kept}
    protocol = identity["protocol"]
    seeds = range(protocol["first_seed"], protocol["first_seed"] + identity["trials"])
    order = [(task, seed) for task in identity["tasks"] for seed in seeds]
    lacking = [f"task {task}, seed {seed}" for task, seed in order if (task, seed) not in records]
    if lacking:
        raise ConfigError(
            f"{out}: {len(lacking)} of {len(order)} episodes have not been played ({lacking[0]}, say); "
            "continue the shards with --resume, then merge again"
        )
    seconds = round(sum(shard.seconds() for shard in shards), 1)
    whole = EvaluationFolder(out, identity)
    whole.adopt(environment)
    for shard in shards:
        for file in sorted((shard.path / "videos").glob("*")):
            (out / "videos").mkdir(exist_ok=True)
            shutil.copyfile(file, out / "videos" / file.name)
    (out / "result.json").unlink(missing_ok=True)  # of an earlier merge
    return whole.finish([records[start] for start in order], tuple(identity["tasks"]), seconds)


def _named(out: Path) -> list[tuple[Path, re.Match[str]]]:
    paths = sorted(out.iterdir()) if out.is_dir() else []
    return [(path, match) for path in paths if (match := FOLDER.fullmatch(path.name))]


def _read(path: Path) -> EvaluationFolder:
    folder = EvaluationFolder(path, {})
    if not folder.header.is_file():
        raise ConfigError(f"{path}: has not begun; evaluate it, then merge again")
    folder.read()
    if not folder.is_described:
        raise ConfigError(f"{folder.header}: no environment has been played; continue it, then merge again")
    return folder


def _same(shards: list[EvaluationFolder]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the identity and environment that all shards share, without the shard."""
    first = shards[0]
    identity = {key: value for key, value in first.identity.items() if key != "shard"}
    for other in shards[1:]:
        other_identity = {key: value for key, value in other.identity.items() if key != "shard"}
        sides = ({**identity, **first.described}, {**other_identity, **other.described})
        different = [key for key in sides[0] | sides[1] if sides[0].get(key) != sides[1].get(key)]
        if different:
            listed = "; ".join(f"{key}: {sides[0].get(key)} and {sides[1].get(key)}" for key in different)
            raise ConfigError(
                f"{first.path} and {other.path} are not of one evaluation: {listed[:1000]}; evaluate all "
                "shards with the same checkpoint, protocol, device and software"
            )
    return identity, first.described
