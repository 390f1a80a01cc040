"""What the dimensions of a policy are, by all that tell them: its tensors, by vote, and what lies beside.

Every tensor that has a dimension has a vote, so one that is missing or damaged hides nothing: it is compared
with what the others say, and named. What else states a dimension (a config file, the public size of the same
width) fills in what no tensor tells, and must agree with what they do.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

_LAYER = re.compile(r"\.layers\.\d+\.")


@dataclass(frozen=True)
class Stated:
    """A dimension that `source` states, by its key in our config."""

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
    """How many axes tell which size of a dimension; of each size one tensor that does."""

    counts: dict[str, dict[int, int]] = field(default_factory=dict)
    example: dict[tuple[str, int], str] = field(default_factory=dict)

    def most(self, key: str, stated: int | None = None) -> int | None:
        """Return the size that most tell; of several the stated one, else the first. None: nothing tells."""
        counts = self.counts.get(key, {})
        return max(counts, key=lambda size: (counts[size], size == stated), default=None)

    def made(self, key: str, size: int, of: str) -> int:
        """Return `size`, remembering that the dimension `key` was worked out of what most tell of `of`."""
        most = self.most(of)
        if most is not None:
            self.example[key, size] = self.by(of, most)
        return size

    def by(self, key: str, size: int) -> str:
        """Return a tensor, under our name, whose dimension `key` has this size; empty: there is none."""
        return self.example.get((key, size), "")


def vote(
    weights: Mapping[str, Tensor],
    axes: Mapping[str, str],
    witnesses: Iterable[Witness] = (),
    theirs: Callable[[str], str] = str,
) -> Votes:
    """Let every tensor of the file (see `theirs`) tell its sizes, once each though it holds many of ours.

    `axes` has, for each of our names (the layer's number is ``*``), the dimensions of its axes in words:
    ``2*expert.width expert.width``. A number is no dimension; ``-`` is one that nothing is to be learnt from.
    """
    votes = Votes()
    heard: set[tuple[str, int, int]] = set()
    for name, tensor in weights.items():
        words = axes.get(_LAYER.sub(".layers.*.", name))
        if words is not None:
            _tell(votes, name, words.split(), tensor.shape, heard, theirs(name))
    for witness in witnesses:
        _tell(votes, witness.name, witness.axes.split(), witness.shape, heard, witness.name)
    return votes


def _tell(
    votes: Votes,
    name: str,
    words: Sequence[str],
    shape: Sequence[int],
    heard: set[tuple[str, int, int]],
    stored: str,
) -> None:
    """Count what the tensor `name` tells, unless the one that it is `stored` in has told it already."""
    if len(words) != len(shape):
        return
    for axis, (word, size) in enumerate(zip(words, shape, strict=True)):
        factor, _, key = word.rpartition("*")
        size, rest = divmod(size, int(factor or 1))
        if key.isdigit() or key == "-" or rest or size < 1:
            continue
        if (stored, axis, size) in heard:
            continue
        heard.add((stored, axis, size))
        counts = votes.counts.setdefault(key, {})
        counts[size] = counts.get(size, 0) + 1
        votes.example.setdefault((key, size), name)


def misfits(weights: Mapping[str, Tensor], axes: Mapping[str, str], votes: Votes) -> list[str]:
    """Name the tensors that have not the sizes that most others tell."""
    found = []
    for name, tensor in weights.items():
        words = axes.get(_LAYER.sub(".layers.*.", name))
        if words is None:
            continue
        want = [_size(word, votes) for word in words.split()]
        have = tuple(tensor.shape)
        if len(have) != len(want) or any(w not in (None, n) for w, n in zip(want, have, strict=True)):
            found.append(f"{name} is {have}, not ({', '.join('-' if w is None else str(w) for w in want)})")
    return found


def _size(word: str, votes: Votes) -> int | None:
    factor, _, key = word.rpartition("*")
    size = int(key) if key.isdigit() else votes.most(key)
    return None if size is None else int(factor or 1) * size


def depth_of(weights: Iterable[str], *parts: str) -> int:
    """Return the number of layers of `parts`, which are equally deep; 1 where there are none."""
    counts: dict[int, int] = {}
    for name in weights:
        found = re.match(rf"(?:{'|'.join(parts)})\.layers\.(\d+)\.", name)
        if found:
            counts[int(found[1])] = counts.get(int(found[1]), 0) + 1
    return 1 + max((layer for layer, count in counts.items() if count > 1), default=0)


def value_at(values: Mapping[str, Any], key: str) -> Any:
    """Return what nested `values` have at a dotted key; None where there is nothing."""
    for piece in key.split("."):
        if not isinstance(values, Mapping):
            return None
        values = values.get(piece)  # type: ignore[assignment]
    return values


def first_stated(stated: Iterable[Stated], key: str) -> int | None:
    """Return the first value that is stated for `key`."""
    return next((one.value for one in stated if one.key == key), None)


def contradictions(
    read: Mapping[str, Any],
    stated: Iterable[Stated],
    given: Mapping[str, Any],
    votes: Votes,
    witnesses: Sequence[Witness] = (),
    theirs: Callable[[str], str] = str,
) -> list[str]:
    """Say where the sizes `read` from tensors are not those stated elsewhere, unless the user said the same.

    A tensor is named by `theirs`, as the file names it; `witnesses`, one by one, have to agree too.
    """
    found = []
    for one in stated:
        size = value_at(read, one.key)
        if size is None or size == one.value or value_at(given, one.key) == size:
            continue
        tensor = votes.by(one.key, size)
        by = theirs(tensor) if tensor else "the tensors"
        found.append(f"contradicted: {one.key} is {size} by {by}, {one.value} by {one.source}")
    for key, counts in votes.counts.items():
        most = max(counts.values())
        even = [f"{size} by {theirs(votes.by(key, size))}" for size, n in counts.items() if n == most]
        if len(even) > 1:
            found.append(f"contradicted: {key} is {', '.join(even)}")
    for witness in witnesses:
        words = witness.axes.split()
        if len(words) != len(witness.shape):
            found.append(
                f"contradicted: {witness.name} is {tuple(witness.shape)}, and has {len(words)} axes elsewhere"
            )
            continue
        sizes = zip(words, witness.shape, strict=True)
        want = [size if word == "-" else value_at(read, word) for word, size in sizes]
        if None not in want and list(witness.shape) != want:
            by = [theirs(votes.by(w, s)) or "the tensors" for w, s in zip(words, want, strict=True)]
            found.append(
                f"contradicted: {witness.name} is {tuple(witness.shape)}, and {' and '.join(words)} are"
                f" {tuple(want)} by {' and '.join(by)}"
            )
    return found
