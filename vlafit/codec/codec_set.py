"""The codecs of a policy for one or several embodiments.

A mixture trains one policy on several robots. Statistics, cameras and relative actions are those of each
embodiment; the shape of what the policy takes is the same for all. Embodiments are known by name.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlafit.codec import codec_file
from vlafit.codec.codec import Codec
from vlafit.codec.codec_file import OWN
from vlafit.codec.tokenizer import Tokenizer
from vlafit.errors import CodecError, ConfigError, did_you_mean, quoted


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
                near = did_you_mean(name, self.names, listed=False)
                raise ConfigError(f"{where}: there is no embodiment {quoted(name)}{near}; it has: {listed}")
            return self[name]
        if len(self) > 1:
            raise ConfigError(
                f"{where}: holds {len(self)} embodiments ({listed}); name one of them: {option}"
            )
        return next(iter(self))

    def of_data(self, name: str, *, where: str) -> Codec:
        """Return the codec for data of the embodiment `name`: of one codec that one, whatever its name.

        `where` begins the ConfigError for a name that several do not have.
        """
        return self.choose(name if len(self) > 1 else "", where=where)

    def detokenise(
        self, tokens: NDArray[np.integer], embodiment_ids: NDArray[np.integer] | None
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return the normalised actions [b, t, A] of action tokens [b, m], and which rows are valid [b].

        `embodiment_ids` [b] are those of the batch; None where there is one embodiment.
        """
        numbers = [None] * len(tokens) if embodiment_ids is None else embodiment_ids.tolist()
        by_number = {codec.embodiment_id: codec for codec in self}
        rows = [
            (by_number[n] if n in by_number else next(iter(self))).detokenise(row)
            for row, n in zip(tokens, numbers, strict=True)
        ]
        return np.stack([row.chunk for row in rows]), np.asarray([row.valid for row in rows])

    def save(self, folder: Path) -> None:
        """Write codec.json and tokenizer/ into `folder`."""
        first = next(iter(self))
        codec_file.write(folder, [codec.parts for codec in self], self.tokenizer, first.action_tokenizer)

    @classmethod
    def load(cls, folder: Path) -> "CodecSet":
        """Read what `save` wrote. Raises CodecError or ConfigError naming what is missing or malformed."""
        parts, words, actions = codec_file.read(folder)
        return cls(
            [
                Codec(
                    one.config, one.embodiment, one.statistics, words, one.embodiment_id, actions, one.origin
                )
                for one in parts
            ]
        )


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
        if codec.action_tokenizer is not first.action_tokenizer:
            raise CodecError(f"{pair} have different action tokenizers; one policy has one")


def _numbered(codecs: Sequence[Codec]) -> list[Codec]:
    if len(codecs) == 1:
        return list(codecs)
    taken = [codec.embodiment_id for codec in codecs if codec.embodiment_id is not None]
    if len(set(taken)) != len(taken):
        raise CodecError(f"embodiments have the same id: {sorted(taken)}")
    free = iter(number for number in range(len(codecs) + max(taken, default=0) + 1) if number not in taken)
    return [c if c.embodiment_id is not None else c.with_changes(embodiment_id=next(free)) for c in codecs]
