"""Every error a user can cause, and the one helper that suggests the name they meant.

A message says what is wrong, where, and how to mend it. The command line prints it alone, without a
traceback, and exits with status 2; anything that is not a `VlafitError` is a bug and keeps its traceback.
"""

import difflib
from collections.abc import Iterable, Mapping


class VlafitError(Exception):
    """Base of all errors that the user can mend."""


class ConfigError(VlafitError):
    """A recipe, card, protocol or strategy file, or a command line, that cannot be what was meant."""


class DataError(VlafitError):
    """A recorded dataset that is missing, damaged, empty, or not what its card says."""


class EmbodimentError(VlafitError):
    """Two things that must describe the same robot do not."""


class CodecError(VlafitError):
    """A value that cannot pass between robot units and tensors."""


class StorageError(VlafitError):
    """Something cannot be written: a full disk, missing rights."""


class WeightsError(VlafitError):
    """A checkpoint whose tensors are not exactly those of the model."""

    tensors: Mapping[str, tuple[str, ...]] = {}
    """The tensors that are wrong, by what is wrong with them, under the names that the file has for them."""


class StrategyError(VlafitError):
    """A tuning strategy that does not cover the model, or names what it does not have."""


class TrainingError(VlafitError):
    """A training run that cannot start, go on, or be resumed."""


class SimulationError(VlafitError):
    """A simulation that cannot be made, rendered or stepped."""


def did_you_mean(word: str, options: Iterable[str], *, listed: bool = True) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest option, or list the options when none is near.

    It ends a sentence: write nothing behind it. Not `listed`: nothing is returned where none is near, for the
    message names the options already.
    """
    options = sorted(options)
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; it can be one of: {', '.join(options)}" if options and listed else ""
