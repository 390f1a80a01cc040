"""Identify a comparison or sweep by plain values: their hash, and their differences to a folder's."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlafit import files
from vlafit.errors import ConfigError, VlafitError

ADDED: Mapping[str, Any] = {
    "policy.base": "", "policy.action_tokenizer": "", "optim.schedule_steps": 0,
    "optim.schedule_from": 0, "optim.states": "auto", "optim.in_backward": "auto", "train.weights": "auto",
    "train.frozen": "auto", "train.recompute": "auto", "train.memory": "", "data.relative": "card",
    "data.mixed_files": 0, "eval.samples": 16, "train.compile": "auto", "train.cache": "off",
    "train.max_delay": 0, "train.packing": "auto", "train.replicas": 0, "data.statistics_from": "",
    "data.vision_language": {}, "adapt.conversion": False, "optim.schedule": "cosine",
}  # fmt: skip
"""Recipe fields that are younger than folders that must still open -> the value that changes nothing."""

AUTOMATIC: Mapping[str, tuple[Any, Any]] = {"train.sharding": ("auto", "none"), "train.accumulate": (0, 1)}
"""Fields -> their automatic value, and what that is in a folder, where only one process trains."""


def flat(values: Mapping[str, Any], without: Sequence[str]) -> dict[str, Any]:
    """Return a recipe's fields as JSON values by dotted name, except those in `without` and unused ADDED."""
    return dict(_flat(values, without))


def _flat(values: Mapping[str, Any], without: Sequence[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        dotted = f"{prefix}{name}"
        if dotted in without or (dotted in ADDED and value == ADDED[dotted]):
            continue
        if isinstance(value, Mapping) and not prefix:
            yield from _flat(value, without, f"{dotted}.")
        elif dotted == "train.precision" and value == "auto":
            yield dotted, "bf16" if _has_bf16() else "fp32"
        elif dotted in AUTOMATIC and value == AUTOMATIC[dotted][0]:
            yield dotted, AUTOMATIC[dotted][1]
        else:
            yield dotted, json.loads(json.dumps(value))


def _has_bf16() -> bool:
    import torch

    from vlafit.train.settle import has_bf16

    return has_bf16(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def digest(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 of an identity."""
    return files.sha256_of_json(values)


def require_same(folder: Path, what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ConfigError, naming the differences, unless `folder` holds the requested comparison or sweep."""
    if digest(before) == digest(now):
        return
    changed = [*_differences(before, now), *_differences(before.get("recipe", {}), now.get("recipe", {}))]
    raise ConfigError(
        f"{folder} holds another {what} (hash {digest(before)[:12]}, requested "
        f"{digest(now)[:12]}): {'; '.join(changed)}. Use the values it started with, or choose another --out"
    )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key), now.get(key)
        if old != new and key != "recipe":
            yield f"{key} was {_short(old)}, is {_short(new)}"


def _short(value: object) -> str:
    if isinstance(value, str) and len(value) == 64:  # a hash
        return value[:12]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def write_or_require_same(path: Path, what: str, now: Mapping[str, Any]) -> None:
    """Write the identity `now` to the new file `path`, or require that an existing one is the same.

    Raises ConfigError if the folder has another identity or holds other files.
    """
    folder = path.parent
    if path.is_file():
        before = files.read_json_object(path, VlafitError, "choose another --out")
        require_same(folder, what, before, now)
        return
    if folder.is_dir() and not files.is_empty(folder):
        raise ConfigError(f"{folder} is not empty and is not a {what}; choose another folder with --out")
    files.write_atomic(path, json.dumps(now, indent=2) + "\n")
