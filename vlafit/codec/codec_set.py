"""The codecs of a policy for one or several embodiments, and codec.json.

A mixture trains one policy on several robots. Statistics, cameras and relative actions are those of each
embodiment; the shape of what the policy takes is the same for all. Embodiments are known by name.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vlafit import config as configuration
from vlafit.codec import tokenizer as tokenizers
from vlafit.codec.codec import Codec
from vlafit.codec.codec_config import CodecConfig
from vlafit.codec.statistics import Statistics
from vlafit.codec.tokenizer import Tokenizer
from vlafit.errors import CodecError, ConfigError, did_you_mean
from vlafit.files import parse_json, write_atomic
from vlafit.types import Embodiment

FORMAT = 1  # of codec.json with one embodiment, which has no number
SEVERAL = 2  # of codec.json whose embodiments have numbers
OWN = ("cameras", "normalisation", "action_normalisation", "relative")
"""Fields of the config that may differ between embodiments; the others describe the policy's input."""
KEYS = {
    FORMAT: {"format", "config", "embodiment", "statistics"},
    SEVERAL: {"format", "config", "embodiments"},
}


class CodecSet:
    """One codec for each embodiment, in a fixed order.

    A single codec stays as it is. Several get numbers, `Codec.embodiment_id`: those that they have, else the
    next free ones in their order.
    """

    def __init__(self, codecs: Sequence[Codec]) -> None:
        """Raises CodecError where there is none, or two do not go together."""
        if not codecs:
            raise CodecError("a set of codecs needs at least one")
        names = [codec.embodiment.name for codec in codecs]
        for name in names:
            if names.count(name) > 1:
                raise CodecError(f"two codecs are for embodiment {name!r}; give each a name of its own")
        _require_alike(codecs)
        self._codecs = {codec.embodiment.name: codec for codec in _numbered(codecs)}

    @classmethod
    def of(cls, codecs: "Codec | CodecSet") -> "CodecSet":
        """Return a set as it is, and a codec as a set of one."""
        return cls([codecs]) if isinstance(codecs, Codec) else codecs

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the embodiments."""
        return tuple(self._codecs)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of all; None where the policy reads no instruction."""
        return next(iter(self)).tokenizer

    @property
    def chunk(self) -> int:
        """Steps of an action chunk."""
        return next(iter(self)).config.chunk

    @property
    def history(self) -> int:
        """Observation steps that the policy reads, the newest included."""
        return next(iter(self)).config.history

    @property
    def max_tokens(self) -> int:
        """Tokens of a prompt."""
        return next(iter(self)).config.max_tokens

    def __len__(self) -> int:
        return len(self._codecs)

    def __iter__(self) -> Iterator[Codec]:
        return iter(self._codecs.values())

    def __contains__(self, name: str) -> bool:
        return name in self._codecs

    def __getitem__(self, name: str) -> Codec:
        return self._codecs[name]

    def choose(self, name: str = "", *, where: str, option: str = "embodiment") -> Codec:
        """Return the codec of the embodiment `name`, or the only one without a name.

        `where` (the checkpoint) begins an error, `option` says how to give the name. Raises ConfigError for a
        name that is not there, and without one where there are several.
        """
        listed = ", ".join(self.names)
        if name:
            if name not in self:
                near = did_you_mean(name, self.names)
                raise ConfigError(f"{where}: there is no embodiment {name!r}{near}; it has: {listed}")
            return self[name]
        if len(self) > 1:
            raise ConfigError(
                f"{where}: holds {len(self)} embodiments ({listed}); name one of them: {option}"
            )
        return next(iter(self))

    def save(self, folder: Path) -> None:
        """Write codec.json and tokenizer/ into `folder`."""
        write_atomic(folder / "codec.json", json.dumps(self._content(), indent=2) + "\n")
        if self.tokenizer is not None:
            self.tokenizer.save(folder / "tokenizer")

    def _content(self) -> dict[str, object]:
        first = next(iter(self))
        shared = asdict(first.config)
        if len(self) == 1 and first.embodiment_id is None:
            return {
                "format": FORMAT,
                "config": shared,
                "embodiment": asdict(first.embodiment),
                "statistics": {first.embodiment.name: _statistics(first)},
            }
        return {
            "format": SEVERAL,
            "config": {name: value for name, value in shared.items() if name not in OWN},
            "embodiments": {
                codec.embodiment.name: {
                    "id": codec.embodiment_id,
                    "config": {name: getattr(codec.config, name) for name in OWN},
                    "embodiment": asdict(codec.embodiment),
                    "statistics": _statistics(codec),
                }
                for codec in self
            },
        }

    @classmethod
    def load(cls, folder: Path) -> "CodecSet":
        """Read what `save` wrote. Raises CodecError or ConfigError naming what is missing or malformed."""
        path = folder / "codec.json"
        content = _read(path)
        if content["format"] == FORMAT:
            embodiment = configuration.build(Embodiment, content["embodiment"], f"{path}: embodiment")
            every = content["statistics"]
            if not isinstance(every, dict) or not isinstance(every.get(embodiment.name), dict):
                raise CodecError(f"{path}: no statistics for embodiment {embodiment.name!r}")
            where = f"{path}: statistics.{embodiment.name}"
            entries = [(None, content["config"], embodiment, every[embodiment.name], where)]
        else:
            entries = [_entry(path, content, name) for name in _table(content["embodiments"], path)]
        words: Tokenizer | None = None
        codecs = []
        for number, settings, embodiment, values, where in entries:
            config = configuration.build(CodecConfig, settings, f"{path}: config")
            if config.prompt is not None and words is None:
                words = tokenizers.load(folder / "tokenizer")
            statistics = {n: Statistics.from_json(v, f"{where}.{n}") for n, v in values.items()}
            codecs.append(Codec(config, embodiment, statistics, words, number))
        return cls(codecs)


def _statistics(codec: Codec) -> dict[str, object]:
    return {name: value.to_json() for name, value in codec.statistics.items()}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CodecError(
            f"{path}: cannot be read: {error.strerror}; is this a checkpoint's folder?"
        ) from None
    except ValueError as error:
        raise CodecError(f"{path}: not JSON: {error}") from None
    several = isinstance(content, dict) and "embodiments" in content
    expected = KEYS[SEVERAL if several else FORMAT]
    if not isinstance(content, dict) or set(content) != expected:
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
) -> tuple[int, Mapping[str, Any], Embodiment, Mapping[str, Any], str]:
    """Return number, config, embodiment and statistics of one embodiment, and where the last are."""
    where, value = f"{path}: embodiments.{name}", content["embodiments"][name]
    expected = {"id", "config", "embodiment", "statistics"}
    if not isinstance(value, dict) or set(value) != expected:
        have = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise CodecError(f"{where}: must have exactly the keys {sorted(expected)}, there are {have}")
    number, own = value["id"], value["config"]
    if type(number) is not int or number < 0:
        raise CodecError(f"{where}: id must be a whole number from 0, is {number!r}")
    if not isinstance(own, dict) or set(own) != set(OWN):
        have = sorted(own) if isinstance(own, dict) else type(own).__name__
        raise CodecError(f"{where}: config must have exactly the keys {sorted(OWN)}, there are {have}")
    if not isinstance(content["config"], dict) or not isinstance(value["statistics"], dict):
        raise CodecError(f"{where}: config and statistics must be tables")
    embodiment = configuration.build(Embodiment, value["embodiment"], f"{where}.embodiment")
    if embodiment.name != name:
        raise CodecError(f"{where}: is the embodiment {embodiment.name!r}; both names must be the same")
    return number, {**content["config"], **own}, embodiment, value["statistics"], f"{where}.statistics"


def _require_alike(codecs: Sequence[Codec]) -> None:
    """Raise CodecError if two codecs would give a policy inputs of different shapes or forms."""
    first = codecs[0]
    for codec in codecs[1:]:
        pair = f"embodiments {first.embodiment.name!r} and {codec.embodiment.name!r}"
        if len(codec.config.cameras) != len(first.config.cameras):
            raise CodecError(
                f"{pair} fill {len(first.config.cameras)} and {len(codec.config.cameras)} camera slots; "
                'give them the same number ("" is an empty slot)'
            )
        one, other = (
            asdict(replace(c.config, **dict.fromkeys(OWN, None)))  # type: ignore[arg-type]
            for c in (first, codec)
        )
        different = [name for name in one if one[name] != other[name]]
        if different:
            name = different[0]
            raise CodecError(f"{pair} have {name} {one[name]!r} and {other[name]!r}; it must be the same")
        if codec.tokenizer is not first.tokenizer:
            raise CodecError(f"{pair} have different tokenizers; one policy has one")


def _numbered(codecs: Sequence[Codec]) -> list[Codec]:
    if len(codecs) == 1:
        return list(codecs)
    taken = [codec.embodiment_id for codec in codecs if codec.embodiment_id is not None]
    if len(set(taken)) != len(taken):
        raise CodecError(f"embodiments have the same id: {sorted(taken)}")
    free = iter(number for number in range(len(codecs) + max(taken, default=0) + 1) if number not in taken)
    return [c if c.embodiment_id is not None else c.with_changes(embodiment_id=next(free)) for c in codecs]
