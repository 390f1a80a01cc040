"""Actions as tokens of a language model: "Action: ", the tokens of a FAST tokenizer, "|", end of sequence.

Where the prompt ends with "Action: ", as pi0.5's does, the part begins with the tokens of FAST.

The tokens of FAST take the place of the last ids of the vocabulary, counted down from its end (openpi,
models/tokenizer.py). Everything here works on ids: going through text, as openpi does, can change them.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlafit.codec.fast import Detokenised, FastTokenizer
from vlafit.codec.tokenizer import Tokenizer
from vlafit.errors import CodecError

PREFIX, END = "Action: ", "|"
SKIPPED = 128  # last ids of PaliGemma's vocabulary, which are special: openpi, models/tokenizer.py


@dataclass(frozen=True)
class ActionTokenConfig:
    """How actions are written as tokens."""

    longest: int
    """Tokens of the action part, special ones included; what is longer is cut, as in openpi and LeRobot."""
    vocabulary: int
    """Tokens of the policy."""
    begins_with_bos: bool = False
    """Whether the part begins with the token that begins a sequence (LeRobot)."""
    fit: bool = False
    """What becomes of tokens that make another number of coefficients. True: they are cut or filled with
    zeros (LeRobot). False: the normalised chunk is 0 (openpi)."""


@dataclass(frozen=True, eq=False)
class ActionText:
    """Writes and reads the action part for chunks of `dimensions`."""

    config: ActionTokenConfig
    words: Tokenizer
    actions: FastTokenizer
    dimensions: int
    announced: bool = False
    """Whether the prompt ends with "Action: "."""

    def __post_init__(self) -> None:
        """Raise CodecError where the vocabulary has no room, or a token is lacking or has two meanings."""
        room = self.config.vocabulary - SKIPPED
        if self.actions.vocab_size > room:
            raise CodecError(
                f"the FAST action tokenizer has {self.actions.vocab_size} tokens; the policy's vocabulary of "
                f"{self.config.vocabulary} has room for {room}"
            )
        for name in ("bos", "eos"):
            if getattr(self.words, name) is None:
                raise CodecError(f"action tokens need a tokenizer with a token {name}, and this one has none")
        around = [self.words.bos, self.words.eos, *self._prefix, *self.words.encode(END)]
        if taken := sorted({token for token in around if token in self.ids}):
            raise CodecError(
                f"the {self.actions.vocab_size} tokens of the FAST action tokenizer take the ids "
                f"{self.ids[0]} to {self.ids[-1]} of {self.config.vocabulary}; among these, {taken} are what "
                f"stands around actions ({PREFIX!r}, {END!r}, begin and end), so that no answer could be "
                "read. Take an action tokenizer of fewer tokens, or a policy of more "
                "(policy.config.language.vocab)"
            )

    def encode(self, chunk: NDArray) -> list[int]:
        """Return the ids of a normalised chunk [t, a], however many there are."""
        assert self.words.bos is not None and self.words.eos is not None
        first = [self.words.bos] if self.config.begins_with_bos else []
        ids = [self._last - token for token in self.actions.encode(chunk)]
        return [*first, *self._prefix, *ids, *self.words.encode(END), self.words.eos]

    def padded(self, chunk: NDArray) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return the ids of a normalised chunk [t, a] and their mask, both [longest]."""
        longest = self.config.longest
        ids = self.encode(chunk)[:longest]
        tokens = np.full(longest, self.words.pad, dtype=np.int64)
        tokens[: len(ids)] = ids
        return tokens, np.arange(longest) < len(ids)

    def decode(self, tokens: NDArray[np.integer], steps: int) -> Detokenised:
        """Return the normalised chunk [steps, a] that the decoded ids [m] stand for.

        It is not valid where "Action: " is missing or the number of coefficients is wrong. An answer that has
        all coefficients and no "|", because it was cut or ended early, is a chunk: openpi executes it.
        """
        ids, prefix, end = tokens.tolist(), self._prefix, self.words.encode(END)
        if self.config.begins_with_bos and ids[:1] == [self.words.bos]:
            ids = ids[1:]
        ended = _find(ids, end)
        ids = ids[:ended] if ended is not None else _before(ids, self.words.eos)
        begun = ids[: len(prefix)] == prefix
        ids = ids[len(prefix) :] if begun else ids
        if not begun and not self.config.fit:
            return Detokenised(np.zeros((steps, self.dimensions)), valid=False)
        chunk, valid = self.actions.decode(
            [self._last - token for token in ids], steps, self.dimensions, fit=self.config.fit
        )
        return Detokenised(chunk, valid and begun)

    @property
    def ids(self) -> range:
        """The ids that stand for FAST's tokens."""
        return range(self._last - self.actions.vocab_size + 1, self._last + 1)

    @property
    def _prefix(self) -> list[int]:
        return [] if self.announced else self.words.encode(PREFIX)

    @property
    def _last(self) -> int:
        """The id of FAST's token 0."""
        return self.config.vocabulary - 1 - SKIPPED


def _find(ids: list[int], wanted: list[int]) -> int | None:
    """Return where `wanted` begins in `ids`; None where it does not occur."""
    return next((i for i in range(len(ids)) if ids[i : i + len(wanted)] == wanted), None)


def _before(ids: list[int], end: int | None) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
