"""Record what a checkpoint was trained on: its base, its datasets, their seeds.

The file history.json of a native checkpoint. It travels with the weights, so that an evaluation on another
machine still knows from which starts the policy has seen demonstrations.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vlafit import config as configuration
from vlafit.checkpoints.tensor_files import read_json_object
from vlafit.errors import WeightsError

FILE = "history.json"
FORMAT = 1


@dataclass(frozen=True)
class Learned:
    """One dataset that a checkpoint was trained on."""

    card: str
    """Name of its data card."""
    sha256: str
    """Of its states, actions, instructions and split; the pictures are not in it."""
    episodes: int
    """0: they are questions about images, not demonstrations."""
    frames: int
    """Or questions."""


@dataclass(frozen=True)
class Lineage:
    """Where a checkpoint comes from. Empty where nobody knows, as with the checkpoints of other programs."""

    format: int = FORMAT
    base: str = ""
    """SHA-256 of the manifest of the checkpoint that training began with; empty: untrained, or unknown."""
    datasets: tuple[Learned, ...] = ()
    """The datasets that it was trained on since `base`."""
    seeds: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Task -> the seeds of its recorded episodes, those that `base` learned from among them."""
    episodes: tuple[str, ...] = ()
    """Digests of the states and of the actions of every episode that it learned from, those of `base` among
    them; see `vlafit.datasets.content`."""
    complete: bool = False
    """Whether `episodes` are all that it ever learned from: not those of another program's checkpoint, or of
    a run before episodes were recorded."""
    made: str = ""
    """The change made to the weights after training, such as an interpolation; empty: none."""

    def write(self, folder: Path) -> None:
        """Write the file into a checkpoint that is still being made."""
        text = json.dumps(asdict(self), indent=1)
        text = re.sub(r"\s+(?=\d+[,\s])", " ", text)  # a task's seeds on one line
        (folder / FILE).write_text(text + "\n", encoding="utf-8")

    def followed_by(
        self,
        base: str,
        datasets: Iterable[Learned],
        seeds: Mapping[str, Iterable[int]],
        episodes: Iterable[str],
    ) -> "Lineage":
        """Return the lineage of what learns from `datasets` when this, of checkpoint `base`, is its past.

        `base` is "" where training begins with fresh weights. `episodes` are the digests of what is learned.
        """
        return Lineage(
            base=base,
            datasets=tuple(datasets),
            seeds=join_seeds(self.seeds, seeds),
            episodes=tuple(sorted({*self.episodes, *episodes})),
            complete=self.complete or not base,
        )


def join_seeds(
    first: Mapping[str, Iterable[int]], second: Mapping[str, Iterable[int]]
) -> dict[str, tuple[int, ...]]:
    """Return the seeds of each task that either has."""
    tasks = sorted({*first, *second})
    return {task: tuple(sorted({*first.get(task, ()), *second.get(task, ())})) for task in tasks}


def read_lineage(folder: Path) -> Lineage:
    """Read the lineage of the checkpoint in `folder`; an empty one where it has none.

    Raises WeightsError when the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return Lineage()
    history = configuration.build(Lineage, read_json_object(path), str(path))
    if history.format != FORMAT:
        raise WeightsError(f"{path}: format {history.format}; this version reads format {FORMAT}")
    return history
