"""Write and read codec.json: what the codecs of one or several embodiments consist of."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from vlafit import config as configuration
from vlafit.codec import fast
from vlafit.codec import tokenizer as tokenizers
from vlafit.codec.codec_config import CodecConfig, require_sizes
from vlafit.codec.fast import FastTokenizer
from vlafit.codec.statistics import Statistics
from vlafit.codec.tokenizer import Tokenizer
from vlafit.errors import CodecError
from vlafit.files import parse_json, plain_text, write_atomic
from vlafit.types import ColumnForm, Embodiment

FORMAT = 1  # of codec.json with one embodiment, which has no number
SEVERAL = 2  # of codec.json whose embodiments have numbers
COLUMNS = ("relative_to", "state_form", "action_form", "state_methods", "action_methods", "valid_steps")
"""Fields that are only written where they are not the defaults, as those in `ALONE`."""
ALONE = ("action_tokens", "action_bins", "crop", "letter_box", "prompt_state")
OWN = ("cameras", "normalisation", "action_normalisation", "relative", "unchanged", "letter_box", *COLUMNS)
"""Fields of the config that may differ between embodiments; the others describe the policy's input."""
ADDED = {"unchanged", "letter_box", *COLUMNS}  # fields that codecs of earlier versions lack
KEYS = {
    FORMAT: {"format", "config", "embodiment", "statistics"},
    SEVERAL: {"format", "config", "embodiments"},
}
ORIGIN = "origin"  # written only where it is not empty


class CodecParts(NamedTuple):
    """What a codec is made of, beside the tokenizer."""

    config: CodecConfig
    embodiment: Embodiment
    statistics: Mapping[str, Statistics]
    embodiment_id: int | None
    origin: Mapping[str, Any]
    """What the files that it was read from say beyond it; see `Codec`."""


def write(
    folder: Path, parts: Sequence[CodecParts], words: Tokenizer | None, actions: FastTokenizer | None
) -> None:
    """Write codec.json, tokenizer/ and action_tokenizer/ into `folder`."""
    write_atomic(folder / "codec.json", json.dumps(_content(parts), indent=2) + "\n")
    if words is not None:
        words.save(folder / "tokenizer")
    if actions is not None:
        actions.save(folder / "action_tokenizer")


def _content(parts: Sequence[CodecParts]) -> dict[str, object]:
    first = parts[0]
    shared = _written(first.config)
    if len(parts) == 1 and first.embodiment_id is None:
        return {
            "format": FORMAT,
            "config": shared,
            "embodiment": asdict(first.embodiment),
            "statistics": {first.embodiment.name: _statistics(first)},
            **_origin(first),
        }
    return {
        "format": SEVERAL,
        "config": {name: value for name, value in shared.items() if name not in OWN},
        "embodiments": {
            one.embodiment.name: {
                "id": one.embodiment_id,
                "config": {name: value for name, value in _written(one.config).items() if name in OWN},
                "embodiment": asdict(one.embodiment),
                "statistics": _statistics(one),
                **_origin(one),
            }
            for one in parts
        },
    }


def _written(config: CodecConfig) -> dict[str, object]:
    """Return the fields to write; those that most codecs do not need are left out, as in earlier versions."""
    values = asdict(config)
    plain = {one.name: one for one in fields(CodecConfig)}
    for name in (*ALONE, *COLUMNS):
        default = plain[name].default
        if getattr(config, name) == (ColumnForm() if default is MISSING else default):
            del values[name]
    return values


def read(folder: Path) -> tuple[list[CodecParts], Tokenizer | None, FastTokenizer | None]:
    """Read what `write` wrote. Raises CodecError or ConfigError naming what is missing or malformed."""
    path = folder / "codec.json"
    content = _read(path)
    if content["format"] == FORMAT:
        embodiment = configuration.build(Embodiment, content["embodiment"], f"{path}: embodiment")
        every = content["statistics"]
        if not isinstance(every, dict) or not isinstance(every.get(embodiment.name), dict):
            raise CodecError(f"{path}: no statistics for embodiment {embodiment.name!r}")
        where = f"{path}: statistics.{embodiment.name}"
        origin = _require_table(content.get(ORIGIN, {}), f"{path}: {ORIGIN}")
        entries = [(None, content["config"], embodiment, every[embodiment.name], where, origin)]
    else:
        entries = [_entry(path, content, name) for name in _table(content["embodiments"], path)]
    words: Tokenizer | None = None
    actions: FastTokenizer | None = None
    parts = []
    for number, settings, embodiment, values, where, origin in entries:
        config = configuration.build(CodecConfig, settings, f"{path}: config")
        require_sizes(config, f"{path}: config")
        if config.prompt is not None and words is None:
            words = tokenizers.load(folder / "tokenizer")
        if config.action_tokens is not None and actions is None:
            actions = fast.load(folder / "action_tokenizer")
        statistics = {n: Statistics.from_json(v, f"{where}.{n}") for n, v in values.items()}
        parts.append(CodecParts(config, embodiment, statistics, number, origin))
    return parts, words, actions


def _statistics(parts: CodecParts) -> dict[str, object]:
    return {name: value.to_json() for name, value in parts.statistics.items()}


def _origin(parts: CodecParts) -> dict[str, object]:
    return {ORIGIN: dict(parts.origin)} if parts.origin else {}


def _require_table(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise CodecError(f"{where} must be a table, is {type(value).__name__}")
    return value


def _read(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(plain_text(path))
    except OSError as error:
        raise CodecError(
            f"{path}: cannot be read: {error.strerror}; is this a checkpoint's folder?"
        ) from None
    except ValueError as error:
        raise CodecError(f"{path}: not JSON: {error}") from None
    several = isinstance(content, dict) and "embodiments" in content
    expected = KEYS[SEVERAL if several else FORMAT]
    own = set(content) - ({ORIGIN} if not several else set()) if isinstance(content, dict) else set()
    if not isinstance(content, dict) or own != expected:
        have = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise CodecError(f"{path}: must have exactly the keys {sorted(expected)}, there are {have}")
    if content["format"] != (SEVERAL if several else FORMAT):
        raise CodecError(f"{path}: format {content['format']!r}, this version reads {FORMAT} and {SEVERAL}")
    return content


def _table(value: object, path: Path) -> Mapping[str, Any]:
    if not isinstance(value, dict) or not value:
        raise CodecError(f"{path}: embodiments must be a table with at least one embodiment")
    return value


def _entry(
    path: Path, content: Mapping[str, Any], name: str
) -> tuple[int, Mapping[str, Any], Embodiment, Mapping[str, Any], str, Mapping[str, Any]]:
    """Return number, config, embodiment and statistics of one embodiment, where the last are, and origin."""
    where, value = f"{path}: embodiments.{name}", content["embodiments"][name]
    expected = {"id", "config", "embodiment", "statistics"}
    if not isinstance(value, dict) or set(value) - {ORIGIN} != expected:
        have = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise CodecError(f"{where}: must have exactly the keys {sorted(expected)}, there are {have}")
    number, own = value["id"], value["config"]
    if type(number) is not int or number < 0:
        raise CodecError(f"{where}: id must be a whole number from 0, is {number!r}")
    if not isinstance(own, dict) or not set(OWN) - ADDED <= set(own) <= set(OWN):
        have = sorted(own) if isinstance(own, dict) else type(own).__name__
        raise CodecError(f"{where}: config must have exactly the keys {sorted(OWN)}, there are {have}")
    if not isinstance(content["config"], dict) or not isinstance(value["statistics"], dict):
        raise CodecError(f"{where}: config and statistics must be tables")
    embodiment = configuration.build(Embodiment, value["embodiment"], f"{where}.embodiment")
    if embodiment.name != name:
        raise CodecError(f"{where}: is the embodiment {embodiment.name!r}; both names must be the same")
    settings, statistics = {**content["config"], **own}, value["statistics"]
    origin = _require_table(value.get(ORIGIN, {}), f"{where}.{ORIGIN}")
    return number, settings, embodiment, statistics, f"{where}.statistics", origin
