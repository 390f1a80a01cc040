"""Infer model sizes from tensor shapes by majority vote, and cross-check them with what config files state.

Every tensor that has a dimension has a vote, so a missing or damaged one hides nothing: it is compared with
what the others say, and named.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

_LAYER = re.compile(r"\.layers\.\d+\.")


@dataclass(frozen=True)
class Stated:
    """A size that `source` states, by its key in the policy's config."""

    key: str
    value: int
    source: str


@dataclass(frozen=True)
class Witness:
    """A tensor that feeds nothing and yet has the policy's dimensions. `axes` as in a table of axes."""

    name: str
    shape: Sequence[int]
    axes: str


@dataclass(frozen=True)
class Votes:
    """How many axes have which size of a dimension, and one tensor that has it."""

    counts: dict[str, dict[int, int]] = field(default_factory=dict)
    example: dict[tuple[str, int], str] = field(default_factory=dict)

    def most(self, key: str, stated: int | None = None) -> int | None:
        """Return the most frequent size; of several the stated one, else the first. None: no votes."""
        counts = self.counts.get(key, {})
        return max(counts, key=lambda size: (counts[size], size == stated), default=None)

    def derived(self, key: str, size: int, dimension: str) -> int:
        """Return `size`; record that `key` was derived from `dimension`, for error messages."""
        most = self.most(dimension)
        if most is not None:
            self.example[key, size] = self.by(dimension, most)
        return size

    def by(self, key: str, size: int) -> str:
        """Return a tensor, under our name, whose dimension `key` has this size; empty if there is none."""
        return self.example.get((key, size), "")


def vote(
    weights: Mapping[str, Tensor],
    axes: Mapping[str, str],
    witnesses: Iterable[Witness] = (),
    file_name: Callable[[str], str] = str,
) -> Votes:
    """Count the sizes of every tensor in the file (see `file_name`) once, also where one holds many.

    `axes` has, for each of our names (a layer's number is ``*``), the dimensions of its axes in words:
    ``2*expert.width expert.width``. A number is no dimension; ``-`` tells nothing.
    """
    votes = Votes()
    counted: set[tuple[str, int, int]] = set()
    for name, tensor in weights.items():
        words = axes.get(_LAYER.sub(".layers.*.", name))
        if words is not None:
            _count(votes, name, words.split(), tensor.shape, counted, file_name(name))
    for witness in witnesses:
        _count(votes, witness.name, witness.axes.split(), witness.shape, counted, witness.name)
    return votes


def _count(
    votes: Votes,
    name: str,
    words: Sequence[str],
    shape: Sequence[int],
    counted: set[tuple[str, int, int]],
    stored: str,
) -> None:
    """Count the sizes of the tensor `name`, unless those of the one it is `stored` in are counted already."""
    if len(words) != len(shape):
        return
    for axis, (word, size) in enumerate(zip(words, shape, strict=True)):
        factor, _, key = word.rpartition("*")
        size, rest = divmod(size, int(factor or 1))
        if key.isdecimal() or key == "-" or rest or size < 1:
            continue
        if (stored, axis, size) in counted:
            continue
        counted.add((stored, axis, size))
        counts = votes.counts.setdefault(key, {})
        counts[size] = counts.get(size, 0) + 1
        votes.example.setdefault((key, size), name)


def misfits(weights: Mapping[str, Tensor], axes: Mapping[str, str], votes: Votes) -> list[str]:
    """Name the tensors that do not have the sizes of most others."""
    wrong = []
    for name, tensor in weights.items():
        words = axes.get(_LAYER.sub(".layers.*.", name))
        if words is None:
            continue
        want = [_size(word, votes) for word in words.split()]
        have = tuple(tensor.shape)
        if len(have) != len(want) or any(w not in (None, n) for w, n in zip(want, have, strict=True)):
            wrong.append(f"{name} is {have}, not ({', '.join('-' if w is None else str(w) for w in want)})")
    return wrong


def _size(word: str, votes: Votes) -> int | None:
    factor, _, key = word.rpartition("*")
    size = int(key) if key.isdecimal() else votes.most(key)
    return None if size is None else int(factor or 1) * size


def depth_of(weights: Iterable[str], *stacks: str) -> int:
    """Return the number of layers of `stacks`, which are equally deep; 1 where there are none."""
    counts: dict[int, int] = {}
    for name in weights:
        match = re.match(rf"(?:{'|'.join(stacks)})\.layers\.(\d+)\.", name)
        if match:
            counts[int(match[1])] = counts.get(int(match[1]), 0) + 1
    return 1 + max((layer for layer, count in counts.items() if count > 1), default=0)


def value_at(values: Mapping[str, Any], key: str) -> Any:
    """Return the value of nested `values` at a dotted key; None where there is none."""
    for piece in key.split("."):
        if not isinstance(values, Mapping):
            return None
        values = values.get(piece)  # type: ignore[assignment]
    return values


def contradictions(
    read: Mapping[str, Any],
    stated: Iterable[Stated],
    given: Mapping[str, Any],
    votes: Votes,
    witnesses: Sequence[Witness] = (),
    file_name: Callable[[str], str] = str,
) -> list[str]:
    """Say where the sizes `read` from tensors are not those stated elsewhere, unless the user gave the same.

    A tensor is named by `file_name`, as the file names it; each of the `witnesses` must agree, too.
    """
    lines = []
    for one in stated:
        size = value_at(read, one.key)
        if size is None or size == one.value or value_at(given, one.key) == size:
            continue
        tensor = votes.by(one.key, size)
        by = file_name(tensor) if tensor else "the tensors"
        lines.append(f"contradicted: {one.key} is {size} by {by}, {one.value} by {one.source}")
    for key, counts in votes.counts.items():
        most = max(counts.values())
        even = [f"{size} by {file_name(votes.by(key, size))}" for size, n in counts.items() if n == most]
        if len(even) > 1:
            lines.append(f"contradicted: {key} is {', '.join(even)}")
    for witness in witnesses:
        words = witness.axes.split()
        if len(words) != len(witness.shape):
            lines.append(
                f"contradicted: {witness.name} is {tuple(witness.shape)}, and has {len(words)} axes elsewhere"
            )
            continue
        sizes = zip(words, witness.shape, strict=True)
        want = [size if word == "-" else value_at(read, word) for word, size in sizes]
        if None not in want and list(witness.shape) != want:
            by = [file_name(votes.by(w, s)) or "the tensors" for w, s in zip(words, want, strict=True)]
            lines.append(
                f"contradicted: {witness.name} is {tuple(witness.shape)}, and {' and '.join(words)} are"
                f" {tuple(want)} by {' and '.join(by)}"
            )
    return lines
