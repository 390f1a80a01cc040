"""Actions as OpenVLA's tokens: each value is one of 256 bins, which are the last tokens of the tokenizer.

Kim et al. 2024, arXiv 2406.09246; the arithmetic is that of prismatic/vla/action_tokenizer.py. Values are
normalised, and those beyond [-1, 1] are written as the end of the range.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlafit.codec.fast import Detokenised

BINS = 256
EDGES = np.linspace(-1, 1, BINS)
CENTRES = (EDGES[:-1] + EDGES[1:]) / 2


@dataclass(frozen=True)
class ActionBinConfig:
    """How actions are written as bins."""

    end: int
    """Tokens of the tokenizer: the bins are the last of them, the lowest value's the very last."""
    longest: int
    """Tokens of the longest chunk, with the one that ends the sequence."""
    eos: int
    """The token that ends the sequence."""
    ends: bool = True
    """Whether an answer ends at that token; False: every place of a chunk holds a token of its own."""


@dataclass(frozen=True)
class ActionBins:
    """Writes and reads chunks of `dimensions`: step by step, a token a dimension, and the end."""

    config: ActionBinConfig
    dimensions: int

    def encode(self, values: NDArray) -> NDArray[np.int64]:
        """Return the token of each normalised value."""
        return self.config.end - np.digitize(np.clip(values, -1, 1), EDGES).astype(np.int64)

    def values(self, tokens: NDArray[np.integer]) -> NDArray[np.float64]:
        """Return the centre of each token's bin; a token that is no action is an end of the range."""
        return CENTRES[np.clip(self.config.end - tokens - 1, 0, len(CENTRES) - 1)]

    def padded(
        self, chunk: NDArray, counted: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return the tokens of a normalised chunk [t, a] and which of them the loss counts, both [longest].

        `counted` [t, a] says so of the values; the end counts always.
        """
        tokens = np.full(self.config.longest, self.config.eos, dtype=np.int64)
        mask = np.zeros(self.config.longest, dtype=np.bool_)
        tokens[: chunk.size] = self.encode(chunk).ravel()
        mask[: chunk.size], mask[chunk.size] = counted.ravel(), True
        return tokens, mask

    def decode(self, tokens: NDArray[np.integer], steps: int) -> Detokenised:
        """Return the normalised chunk [steps, a] of the answered tokens [m].

        It is not valid where a token is no action. Such a token gives an end of the range, as in OpenVLA's
        code; those from one on that ends an answer early give 0. Where all tokens are answered in one pass
        none does, as in OFT's code.
        """
        wanted = steps * self.dimensions
        own = tokens[:wanted]
        ended = np.flatnonzero(own == self.config.eos)
        written = int(ended[0]) if self.config.ends and len(ended) else len(own)
        values = np.zeros(wanted)
        values[:written] = self.values(own[:written])
        actions = (own >= self.config.end - BINS) & (own < self.config.end)
        return Detokenised(values.reshape(steps, self.dimensions), len(own) == wanted and bool(actions.all()))
