"""The FAST action tokenizer: a chunk's discrete cosine transform as text, compressed by byte pairs.

Pertsch et al. 2025, arXiv 2501.09747. The files are those of the published processor (tokenizer.json and
processor_config.json); its Python file is neither needed nor run. Chunks are normalised and have the robot's
own dimensions, without padding.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from vlafit.codec import tokenizer_limits as limits
from vlafit.errors import CodecError, brief
from vlafit.files import parse_object, plain_text, write_atomic

SCALE = 10.0  # published processor: coefficients are rounded to a tenth
VOCABULARY = 1024  # published processor: default of `fit`
LONGEST_TOKEN = 10_000  # characters: published processor
MOST_CHARACTERS = 0x10FFFF  # the last code point
BROKEN = 0xFFFD  # what a decoder writes for bytes that are no character; no chunk has such a coefficient
NO_CHARACTERS = np.array([*range(0xD800, 0xE000), BROKEN])  # surrogates, and what stands for them
CONFIG, FILE = "processor_config.json", "tokenizer.json"


class Detokenised(NamedTuple):
    """A decoded chunk [t, a], float64, normalised; `valid` is False where the tokens do not make one."""

    chunk: NDArray[np.float64]
    valid: bool


@dataclass(frozen=True, eq=False)
class FastTokenizer:
    """A fitted FAST tokenizer. Token ids count from 0."""

    backend: tokenizers.Tokenizer
    scale: float
    """Coefficients are multiplied by it and rounded to whole numbers."""
    min_token: int
    """The smallest coefficient, written as code point 0; smaller ones are raised to it."""

    def __post_init__(self) -> None:
        self.backend.no_padding()  # a file may ask for either; the published processor does neither
        self.backend.no_truncation()

    def __reduce__(self) -> tuple[object, ...]:
        return FastTokenizer, (self.backend, self.scale, self.min_token)

    def is_same(self, other: "FastTokenizer") -> bool:
        """Whether both write every chunk as the same tokens, because their files say the same."""
        own, its = ((one.scale, one.min_token, one.backend.to_str()) for one in (self, other))
        return own == its

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, chunk: NDArray) -> list[int]:
        """Return the ids of `chunk` [t, a]. Nothing is clipped but coefficients below the smallest one."""
        return self.backend.encode(_text(self.coefficients(chunk), self.min_token)).ids

    def coefficients(self, chunk: NDArray) -> NDArray[np.float64]:
        """Return the rounded coefficients [t, a], slow ones first."""
        return _coefficients(chunk, self.scale)

    def decode(self, ids: Sequence[int], steps: int, dimensions: int, *, fit: bool = False) -> Detokenised:
        """Return the chunk [steps, dimensions] that `ids` stand for.

        Ids that make another number of coefficients, that the tokenizer does not know, or whose bytes are no
        characters, are not valid: the chunk is 0 (openpi), or with `fit` what is left after cutting or
        filling with zeros (LeRobot, which makes coefficients of 65,533 of such bytes; here they are 0).
        """
        wanted = steps * dimensions
        known = [i for i in ids if 0 <= i < self.vocab_size]
        text = self.backend.decode(known, skip_special_tokens=False)
        letters = np.fromiter(map(ord, text), np.int64, len(text))
        broken = letters == BROKEN
        values = np.where(broken, 0.0, letters + self.min_token)
        valid = len(known) == len(ids) and len(values) == wanted and not broken.any()
        if not valid:
            values = np.concatenate([values[:wanted], np.zeros(max(0, wanted - len(values)))])
            values = values if fit else np.zeros(wanted)
        return Detokenised(_cosines(steps).T @ (values.reshape(steps, dimensions) / self.scale), valid)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and processor_config.json, as the published processor has them."""
        config = {"scale": self.scale, "min_token": self.min_token, "vocab_size": self.vocab_size}
        write_atomic(folder / FILE, self.backend.to_str(pretty=True))
        write_atomic(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def load(folder: Path | str) -> FastTokenizer:
    """Load the FAST tokenizer in `folder`. Raises CodecError where there is none, or it is damaged."""
    folder = Path(folder)
    for name in (FILE, CONFIG):
        if not (folder / name).is_file():
            raise CodecError(f"{folder}: no FAST action tokenizer: {name} is missing")
    limits.require_small_files(folder)
    try:
        text = plain_text(folder / FILE)
        limits.require_bounded(parse_object(text), folder / FILE)
        backend = tokenizers.Tokenizer.from_str(text)
        config = parse_object(plain_text(folder / CONFIG))
        scale, least = config["scale"], config["min_token"]
    except CodecError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception on malformed files
        raise CodecError(f"{folder}: not a readable FAST action tokenizer: {brief(error)}") from error
    if type(scale) not in (int, float) or not 0 < scale < 1e6:
        raise CodecError(f"{folder / CONFIG}: scale is {scale!r}; it must be a number above 0")
    if type(least) is not int or abs(least) > MOST_CHARACTERS:
        raise CodecError(f"{folder / CONFIG}: min_token is {least!r}; it must be a whole number")
    if backend.normalizer is not None:
        raise CodecError(f"{folder / FILE}: has a normalizer, which changes coefficients; it must have none")
    made = FastTokenizer(backend, float(scale), least)
    if backend.encode("").ids:
        raise CodecError(f"{folder / FILE}: its post_processor adds tokens to every chunk; it must add none")
    return made


def fit(chunks: Iterable[NDArray], vocab_size: int = VOCABULARY, scale: float = SCALE) -> FastTokenizer:
    """Fit a tokenizer on normalised chunks [t, a], by the published algorithm.

    Raises CodecError without chunks, and where their coefficients have a wider range than `vocab_size`.
    """
    texts = [_coefficients(chunk, scale) for chunk in chunks]
    if not texts:
        raise CodecError("a FAST action tokenizer cannot be fitted: there are no action chunks")
    least = int(min(values.min() for values in texts))
    most = int(max(values.max() for values in texts))
    if most - least >= vocab_size:
        raise CodecError(
            f"a FAST action tokenizer of {vocab_size} tokens cannot be fitted: the coefficients of the "
            f"normalised actions reach from {least} to {most}; are single values far outside the statistics? "
            "Otherwise a larger vocabulary is needed"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    # The published `fit` lists raw characters as the alphabet, so that bytes that no chunk has are in no
    # token and vanish when they are encoded. All bytes are listed here.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=list[str | AddedToken](),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=LONGEST_TOKEN,
    )
    backend.train_from_iterator((_text(values, least) for values in texts), trainer=trainer)
    return FastTokenizer(backend, scale, least)


def _coefficients(chunk: NDArray, scale: float) -> NDArray[np.float64]:
    """Return the rounded coefficients [t, a] of a chunk [t, a], slow ones first."""
    return np.rint(_cosines(len(chunk)) @ np.asarray(chunk, np.float64) * scale)


@cache
def _cosines(steps: int) -> NDArray[np.float64]:
    """Return the orthonormal matrix [steps, steps] of the discrete cosine transform of kind II."""
    k, n = np.arange(steps)[:, None], np.arange(steps)[None]
    matrix = np.sqrt(2 / steps) * np.cos(np.pi * k * (2 * n + 1) / (2 * steps))
    matrix[0] = np.sqrt(1 / steps)
    matrix.flags.writeable = False
    return matrix


def _text(coefficients: NDArray[np.float64], least: int) -> str:
    """Return one character for each coefficient, row by row."""
    points = np.maximum(coefficients.ravel() - least, 0)
    if points.max() > MOST_CHARACTERS or np.isin(points, NO_CHARACTERS).any():
        raise CodecError(
            f"a coefficient of the normalised actions is {coefficients.ravel()[points.argmax()]:.0f}, which "
            "a FAST action tokenizer cannot write: the actions are far outside the statistics"
        )
    return "".join(map(chr, points.astype(np.int64).tolist()))
