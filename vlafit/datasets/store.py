"""Recorded episodes, whatever their layout: the interface of a store."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.asked import LONGEST, several, whole_number
from vlafit.datasets.card import Card
from vlafit.datasets.selection import LeftOut
from vlafit.datasets.stamps import Stamp, stamp
from vlafit.errors import DataError, did_you_mean
from vlafit.types import Embodiment, Observation, Sample


@dataclass(frozen=True)
class EpisodeInfo:
    """One episode. `id` is unique in its store and does not depend on where the files are."""

    id: str
    task: str
    instruction: str
    length: int
    seed: int | None = None
    """The simulation seed that the episode started from, if the file records it."""


@dataclass(frozen=True)
class RecordedStatistics:
    """Statistics that a dataset's files state of all its rows."""

    file: str = ""
    """The file, as it is called in the dataset."""
    count: int = 0
    """Of how many rows; 0 if that is not stated."""
    columns: Mapping[str, Mapping[str, NDArray[np.float64]]] = field(default_factory=dict)
    """"state" and "action" -> min, max, mean, std, q01, q99, each [d], as far as they are stated."""
    reason: str = ""
    """Why there are none that belong to the episodes' rows."""


class EpisodeStore(ABC):
    """Random access to the episodes of one dataset.

    A subclass sets `card` and `episodes` in its constructor and implements `state`, `actions` and `image`. It
    checks the files against the card when it opens them. Columns may be read lazily: callers ask for one
    episode at a time and keep nothing. A store can be pickled; a worker process opens files when it first
    reads from them.
    """

    card: Card
    episodes: tuple[EpisodeInfo, ...]
    left_out: tuple[LeftOut, ...] = ()
    """Episodes of the files that are not used, and why."""
    splits: Mapping[str, str] = MappingProxyType({})
    """What the files say of splits, such as {"train": "0:80", "test": "80:100"}; they are not followed."""
    selects: bool = False
    """Whether the layout follows a card's [episodes] (see `vlafit.datasets.selection`)."""
    counts_rows: bool = False
    """Whether the layout compares rows with a card's rows.observations."""

    @property
    def embodiment(self) -> Embodiment:
        """The robot that the episodes show."""
        return self.card.embodiment

    @cached_property
    def _cameras(self) -> tuple[str, ...]:
        # Kept: a card makes its embodiment anew each time, which is a good part of a sample's time.
        return tuple(camera.name for camera in self.embodiment.cameras)

    @cached_property
    def _slots(self) -> dict[str, int]:
        return {camera.name: slot for slot, camera in enumerate(self.card.robot.cameras)}

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {info.id: position for position, info in enumerate(self.episodes)}

    def index(self, episode_id: str) -> int:
        """Return the position of an episode by its id. Raises DataError if there is none."""
        try:
            return self._positions[episode_id]
        except (KeyError, TypeError):
            near = ""
            if isinstance(episode_id, str):
                near = did_you_mean(episode_id, self._positions, listed=len(self._positions) < 20)
            near = near or f"; it has {len(self._positions)}, such as {next(iter(self._positions), '-')!r}"
            raise DataError(f"dataset {self.card.name!r} has no episode {episode_id!r}{near}") from None

    @abstractmethod
    def state(self, episode: int) -> NDArray[np.float32]:
        """Return the states [T, s] of the episode at a position, read-only."""

    @abstractmethod
    def actions(self, episode: int) -> NDArray[np.float32]:
        """Return the actions [T, a] of the episode at a position, read-only."""

    @abstractmethod
    def image(self, episode: int, step: int, camera: str) -> NDArray[np.uint8]:
        """Return one frame, uint8 RGB [h, w, 3], upright, read-only."""

    def images(self, episode: int, steps: Sequence[int], camera: str) -> NDArray[np.uint8]:
        """Return the frames at `steps`, [n, h, w, 3]. Video layouts override this to decode once."""
        steps = self.require_steps(episode, steps)
        if not steps:
            return self.no_frames(camera)
        return np.stack([self.image(episode, step, camera) for step in steps])

    def frames_at(self, episode: int, step: int) -> dict[str, NDArray[np.uint8]]:
        """Return the frame of each camera at one step. Layouts override this to check their files once."""
        return {name: self.image(episode, step, name) for name in self._cameras}

    def no_frames(self, camera: str) -> NDArray[np.uint8]:
        """Return the frames of a camera at no step, [0, h, w, 3]."""
        declared = self.card.robot.cameras[self.camera_slot(camera)]
        return np.empty((0, declared.height, declared.width, 3), np.uint8)

    def files(self) -> tuple[Path, ...]:
        """Return the files that hold the data."""
        return tuple(self.card.files())

    def stamps(self) -> list[tuple[Path, Stamp]]:
        """Return the files with their sizes and times. Raises DataError if one is missing."""
        return [(path, stamp(path)) for path in self.files()]

    def unnamed_files(self) -> list[str]:
        """Return files among those of the dataset that belong to no episode, by their names in its folder.

        The default is for layouts that list their episodes by their files.
        """
        return []

    def film_beside(self, episode: int, camera: str) -> Path | None:
        """Return a video beside the files that shows the frames of a camera once more, in the right colours.

        Checks compare them. The default is for layouts that have none.
        """
        return None

    def success_key(self) -> str:
        """Return the name by which a card's episodes.success could follow success in the files; "" if none.

        The default is for layouts that record none.
        """
        return ""

    def filter_keys(self) -> dict[str, int]:
        """Return the names by which the files choose episodes, and how many each chooses.

        The default is for layouts that have none.
        """
        return {}

    def recorded_statistics(self) -> RecordedStatistics:
        """Return the statistics of "state" and "action" that the files themselves state of all rows.

        The default is for layouts that keep none.
        """
        return RecordedStatistics(reason=f"layout {self.card.layout!r} keeps no statistics in its files")

    def ahead(self) -> int:
        """Return how many bytes of files may be copied before they are read; 0 if all files are here."""
        return 0

    def files_of(self, episode: int) -> list[tuple[Path, int]]:
        """Return the files of an episode with their sizes, if its store copies them when it reads them."""
        return []

    def copy_ahead(self, path: Path) -> None:  # noqa: B027
        """Copy a file that will be read soon, if it is not here. Raises DataError if that fails."""

    def close(self) -> None:  # noqa: B027
        """Close open files; they reopen when needed. The default is for stores that keep none open."""

    def sample(self, episode: int, step: int, chunk: int, history: int = 1) -> Sample:
        """Return the observation at `step` and the `chunk` actions from there on.

        Past the episode's end the last action is repeated, and `is_real` is False. `history` counts observed
        steps, the present one included; earlier ones are in `observation.past`, fewer at the episode's start.
        Raises DataError saying which values are allowed.
        """
        step = self.require_step(episode, step)
        chunk = whole_number(chunk, "chunk, the steps of an action chunk,", 1, LONGEST)
        history = whole_number(history, "history, the observed steps,", 1, LONGEST)
        info = self.episodes[episode]
        cameras = self._cameras
        states = self.state(episode)
        past: tuple[Observation, ...] = ()
        if history > 1 and step > 0:
            earlier = list(range(max(0, step - history + 1), step))
            frames = {name: self.images(episode, [*earlier, step], name) for name in cameras}
            past = tuple(
                Observation({name: frames[name][i] for name in cameras}, states[row], info.instruction)
                for i, row in enumerate(earlier)
            )
            images = {name: frames[name][-1] for name in cameras}
        else:
            images = self.frames_at(episode, step)
        actions, is_real = _chunk(self.actions(episode), step, chunk)
        observation = Observation(images, states[step], info.instruction, past=past)
        return Sample(observation, actions, is_real, (self.card.name, info.id, step))

    def require_episode(self, episode: int) -> int:
        """Return the position of an episode as an int. Raises DataError if the store has no such episode."""
        count = len(self.episodes)
        if type(episode) is int and 0 <= episode < count:
            return episode
        if not count:
            raise DataError(f"dataset {self.card.name!r} has no episodes")
        remedy = ""
        if isinstance(episode, str) and episode in self._positions:
            remedy = f"; store.index({episode!r}) is that of this id"
        return whole_number(episode, f"dataset {self.card.name!r}: episode", 0, count - 1, remedy)

    def require_step(self, episode: int, step: int) -> int:
        """Return a step as an int. Raises DataError naming the episode if it has no such step."""
        # The first check alone decides in most cases; it is made for each frame that is read.
        episodes = self.episodes
        known = type(step) is type(episode) is int and 0 <= episode < len(episodes)
        if known and 0 <= step < episodes[episode].length:
            return step
        info = episodes[self.require_episode(episode)]
        return whole_number(step, f"episode {info.id!r}: step", 0, info.length - 1)

    def require_steps(self, episode: int, steps: Iterable[int]) -> list[int]:
        """Return several steps as a list of ints. Raises DataError as `require_step` does."""
        listed = several(steps, f"episode {self.episodes[self.require_episode(episode)].id!r}: steps")
        return [self.require_step(episode, step) for step in listed]

    def camera_slot(self, camera: str) -> int:
        """Return the position of a camera in the card. Raises DataError if there is none."""
        slot = self._slots.get(camera) if isinstance(camera, str) else None
        if slot is None:
            near = did_you_mean(camera if isinstance(camera, str) else "", self._slots)
            raise DataError(f"dataset {self.card.name!r} has no camera {camera!r}{near}")
        return slot


def _chunk(
    actions: NDArray[np.float32], step: int, chunk: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return `chunk` actions from `step` on, the last one repeated, and which of them are real."""
    if step + chunk <= len(actions):
        return actions[step : step + chunk].copy(), np.ones(chunk, np.bool_)
    rows = np.arange(step, step + chunk)
    return actions[np.minimum(rows, len(actions) - 1)], rows < len(actions)
