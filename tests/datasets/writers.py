"""A writer of the small dataset for each layout; the contract tests run for every layout that ships."""

from collections.abc import Callable
from pathlib import Path

from tests.datasets import lerobot_files, npz_layout
from tests.datasets.layouts import Demo, card, robomimic_card, write_libero, write_robomimic
from vlafit.datasets import Card

Writer = Callable[[Path, list[Demo]], Card]


def libero(folder: Path, everything: list[Demo]) -> Card:
    return card(write_libero(folder, everything))


def robomimic(folder: Path, everything: list[Demo]) -> Card:
    return robomimic_card(write_robomimic(folder, everything))


def outside(folder: Path, everything: list[Demo]) -> Card:
    return npz_layout.write(folder, everything, card(folder))


WRITERS: dict[str, Writer] = {
    "lerobot": lerobot_files.write,
    "libero": libero,
    "robomimic": robomimic,
    npz_layout.__name__: outside,
}
