"""The share of an evaluation's episodes that one of several machines plays."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vlafit.errors import ConfigError

Start = tuple[str, int]
"""Task and seed."""


@dataclass(frozen=True)
class Shard:
    """Share `number` of `count`, from 1."""

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise ConfigError(
                f"shard {self.number}/{self.count}: must be from 1/{self.count} to {self.count}"
            )

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read ``2/4``."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None:
            raise ConfigError(f"shard {text!r}: write NUMBER/COUNT, 1/4 to 4/4 for four machines")
        return cls(int(match[1]), int(match[2]))

    @property
    def folder(self) -> str:
        """Name of the shard's folder."""
        return f"shard-{self.number}-of-{self.count}"

    def of(self, starts: Sequence[Start]) -> list[Start]:
        """Return those of the starts of an evaluation that belong to the shard."""
        return [start for i, start in enumerate(starts) if i % self.count == self.number - 1]
