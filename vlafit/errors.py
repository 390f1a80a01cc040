"""Exceptions for errors that users can fix, and `did_you_mean`, which suggests the nearest valid name.

A message says what is wrong, where, and how to fix it. The command line prints only the message, without a
traceback, and exits with status 2; anything that is not a `VlafitError` is a bug and keeps its traceback.
"""

import difflib
import shlex
from collections.abc import Iterable, Mapping, Sequence

OUTPUT = "standard output"  # in the place of a file, in an error of writing to it
LONGEST_QUOTE = 200  # characters of what a user or a file gave, in a message
LONGEST_URL = 200  # characters of an address in a message
MOST_NAMES = 8  # of a list of names in a line
LONGEST_LINE = 4000  # characters of a line of a message; what a damaged file holds may be far longer


class VlafitError(Exception):
    """Base class of all errors that the user can fix."""

    def __str__(self) -> str:
        """Return the message, of which the middle of a very long line is left out."""
        return "\n".join(map(_shortened, super().__str__().split("\n")))


def _shortened(line: str) -> str:
    if len(line) <= LONGEST_LINE:
        return line
    return f"{line[:3000]} ... ({len(line) - 3800} characters left out) ... {line[-800:]}"


class ConfigError(VlafitError):
    """An invalid recipe, card, protocol or strategy file, or an invalid command line."""


class DataError(VlafitError):
    """A dataset that is missing, damaged, empty, or different from its card."""


class EmbodimentError(VlafitError):
    """Two descriptions of a robot that must agree (dataset, checkpoint, environment) differ."""


class CodecError(VlafitError):
    """A value that cannot be converted between robot units and tensors."""


class AnswerError(VlafitError):
    """A policy's tokens that make no chunk of actions, where a robot is to stop then."""


class StorageError(VlafitError):
    """A file or folder cannot be written: full disk, missing permissions."""


class WeightsError(VlafitError):
    """A checkpoint whose tensors do not match the model exactly."""

    tensors: Mapping[str, tuple[str, ...]] = {}
    """Names of the wrong tensors as the file spells them, by kind of fault."""


class StrategyError(VlafitError):
    """A tuning strategy that does not cover the model, or names parameters the model does not have."""


class TrainingError(VlafitError):
    """A training run that cannot start, continue or be resumed."""


class SimulationError(VlafitError):
    """A simulation that cannot be created, rendered or stepped."""


class RemoteError(VlafitError):
    """A server of actions that cannot be reached, or refuses what it was sent."""


_CONTROLS = {c: f"\\x{c:02x}" for c in (*range(32), *range(127, 160)) if chr(c) not in "\n\r\t"}
_CONTROLS |= {c: f"\\u{c:04x}" for c in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}  # reorder a line


def printable(text: str) -> str:
    """Return `text` with control characters as escapes, so that no terminal obeys them."""
    return text.translate(_CONTROLS)


def quoted(value: object, most: int = LONGEST_QUOTE) -> str:
    """Return a value as a message quotes it: its `repr`, of which a long one is cut, with its length."""
    if isinstance(value, str) and len(value) > most:
        return f"{value[:most]!r}... ({len(value)} characters)"
    try:
        text = repr(value)
    except Exception:  # a number of more than 4300 digits, or an object of another library
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= most else f"{text[:most]}..."


def brief(error: Exception) -> str:
    """Return kind and message of another library's error, without all that a damaged file holds."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text: {error.reason} at byte {error.start}"
    text = printable(repr(error))
    return text if len(text) <= 300 else f"{text[:300]}..."


def shown_url(url: str) -> str:
    """Return an address as messages and names of folders show it: without password, query and fragment."""
    scheme, colon, rest = url.partition("://")
    if not colon:
        scheme, rest = "", url
    rest = rest.partition("?")[0].partition("#")[0]
    host, slash, path = rest.partition("/")
    text = f"{scheme}{colon}{host.rpartition('@')[2]}{slash}{path}"
    return text if len(text) <= LONGEST_URL else f"{text[:LONGEST_URL]}..."


def shown_whole(value: int) -> str:
    """Return a whole number as a message shows it: one less than a large power of two as that."""
    power = (value + 1).bit_length() - 1
    return f"2**{power} - 1" if power > 31 and value + 1 == 1 << power else str(value)


def short_list(names: Sequence[str]) -> str:
    """Return names in a line, only the first and the last where there are more than `MOST_NAMES`."""
    if len(names) <= MOST_NAMES:
        return ", ".join(names)
    return f"{names[0]}, {names[1]}, ... {names[-1]} ({len(names)} names)"


def contrasted(first: Sequence[str], second: Sequence[str]) -> tuple[str, str]:
    """Return two lists of names that differ, each in a line, so that the lines differ, too.

    Of long lists of one length that have names in common, only the names that differ are shown.
    """
    if max(len(first), len(second)) <= MOST_NAMES or not set(first) & set(second):
        return short_list(first), short_list(second)
    if len(first) != len(second):
        return ", ".join(first), ", ".join(second)
    places = [i for i, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1]]
    rest = f" and {len(places) - MOST_NAMES} more" * (len(places) > MOST_NAMES)

    def line(names: Sequence[str]) -> str:
        return ", ".join(f"{names[i]} (number {i + 1})" for i in places[:MOST_NAMES]) + rest

    return line(first), line(second)


def command_line(*words: object) -> str:
    """Return a command of vlafit as a shell reads it: paths with spaces or signs of the shell are quoted."""
    return shlex.join(["vlafit", *map(str, words)])


def nearest(word: str, options: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest option, of those that a message lists."""
    return did_you_mean(word, options, listed=False)


def did_you_mean(word: str, options: Iterable[str], *, listed: bool = True) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest option, or a list of the options if none is near.

    Append it at the end of a message. With `listed=False` the options are never listed, for messages that
    already name them.
    """
    options = sorted(options)
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; it can be one of: {', '.join(options)}" if options and listed else ""


def ranges(numbers: Iterable[int], most: int = 5) -> str:
    """Return ascending numbers with neighbours together, such as "0 to 48, 52", of many the first."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [f"{first} to {last}" if last > first else f"{first}" for first, last in runs]
    rest = sum(last - first + 1 for first, last in runs[most:])
    return ", ".join(texts[:most]) + (f" and {rest} more" if rest else "")
