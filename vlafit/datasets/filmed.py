"""Episodes whose columns are in another store and whose frames, of all cameras or some, are videos."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.card import Card
from vlafit.datasets.selection import LeftOut
from vlafit.datasets.stamps import Stamps
from vlafit.datasets.store import EpisodeInfo, EpisodeStore
from vlafit.datasets.video import VideoFiles
from vlafit.errors import DataError

OPEN_VIDEOS = 32
KNOWN_TIMES = 512  # videos whose times of frames are kept


class FilmedStore(EpisodeStore):
    """The episodes of `columns`, with frames of videos."""

    selects = counts_rows = True

    def __init__(
        self,
        card: Card,
        columns: EpisodeStore,
        find: Callable[[EpisodeInfo, str], Path],
        *,
        flag: bool = False,
        exact: bool = False,
    ) -> None:
        """`find` returns the video of an episode for a camera's key, or raises DataError.

        Cameras that `columns` has are read from there. With `exact` a video that has more frames than an
        episode has rows is an error, too. With `flag` the last dimension of the columns' state tells which
        rows to use, and is no state.
        Raises DataError naming what is missing; with the card's on_bad = "skip" such episodes are left out,
        also those whose videos are too short, which else is an error when their frames are read.
        """
        self.card, self._columns, self._flag, self._exact = card, columns, flag, exact
        held = {camera.name for camera in columns.card.robot.cameras}
        self._filmed = tuple(camera.name for camera in card.robot.cameras if camera.name not in held)
        self._stamps = Stamps()
        self._reset()
        skip = card.episodes.on_bad == "skip"
        left_out = list(columns.left_out)
        self._kept: list[tuple[int, NDArray[np.int64], tuple[Path, ...]]] = []
        infos: list[EpisodeInfo] = []
        for number, info in enumerate(columns.episodes):
            try:
                rows = self._rows(number)
                filmed = [camera for camera in card.robot.cameras if camera.name in self._filmed]
                videos = tuple(find(info, camera.key) for camera in filmed)
                for video in videos if skip else ():
                    self._times(video, info, int(rows[-1]))
            except DataError as error:
                if not skip:
                    raise
                left_out.append(LeftOut(info.id, str(error)))
                continue
            self._kept.append((number, rows, videos))
            infos.append(EpisodeInfo(info.id, info.task, info.instruction, len(rows), info.seed))
        if not infos:
            raise DataError(
                f"dataset {card.name!r}: no episode is left of {len(left_out)}: {left_out[0].reason}"
            )
        self.episodes, self.left_out = tuple(infos), tuple(left_out)

    def state(self, episode: int) -> NDArray[np.float32]:
        number, rows, _ = self._kept[self.require_episode(episode)]
        state = self._columns.state(number)
        return _read_only(state[rows, :-1] if self._flag else state)

    def actions(self, episode: int) -> NDArray[np.float32]:
        number, rows, _ = self._kept[self.require_episode(episode)]
        return _read_only(self._columns.actions(number)[rows])

    def image(self, episode: int, step: int, camera: str) -> NDArray[np.uint8]:
        return self.images(episode, [step], camera)[0]

    def images(self, episode: int, steps: Sequence[int], camera: str) -> NDArray[np.uint8]:
        slot = self.camera_slot(camera)
        steps = self.require_steps(episode, steps)
        if not steps:
            return self.no_frames(camera)
        number, rows, videos = self._kept[episode]
        if camera not in self._filmed:
            return self._columns.images(number, rows[list(steps)].tolist(), camera)
        declared, video = self.card.robot.cameras[slot], videos[self._filmed.index(camera)]
        info = self.episodes[episode]
        self._stamps.require_unchanged(video)
        times = self._times(video, self._columns.episodes[number], int(rows[-1]))
        ordered = sorted(set(steps))
        wanted = times[rows[ordered]].tolist()
        near = 0.25 * float(np.diff(times).min()) if len(times) > 1 else 1e-6
        frames = dict(zip(ordered, self._videos.get(video).read(wanted, near), strict=True))
        for step, frame in frames.items():
            if frame.shape != (declared.height, declared.width, 3):
                raise DataError(
                    f"{video}: episode {info.id}, step {step} is {frame.shape}, the card says "
                    f"{declared.height}x{declared.width} for camera {camera!r}"
                )
        stacked = declared.upright(np.stack([frames[step] for step in steps]))
        stacked.flags.writeable = False
        return stacked

    def files(self) -> tuple[Path, ...]:
        return (*self._columns.files(), *sorted({video for _, _, videos in self._kept for video in videos}))

    def close(self) -> None:
        self._columns.close()
        self._videos.close()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_videos": None, "_known": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._reset()

    def _reset(self) -> None:
        self._videos = VideoFiles(OPEN_VIDEOS)
        self._known: OrderedDict[Path, NDArray[np.float64]] = OrderedDict()

    def _rows(self, number: int) -> NDArray[np.int64]:
        """Return the rows of an episode that are used."""
        info = self._columns.episodes[number]
        if not self._flag:
            return np.arange(info.length)
        rows = np.flatnonzero(self._columns.state(number)[:, -1])
        if not len(rows):
            raise DataError(
                f"episode {info.id}: the robot moves in none of its {info.length} rows; leave it out"
            )
        return rows

    def _times(self, video: Path, info: EpisodeInfo, last: int) -> NDArray[np.float64]:
        """Return when each frame of a video is shown. Raises DataError if it has none for row `last`."""
        times = self._known.get(video)
        if times is None:
            times = self._known[video] = np.array(self._videos.get(video).times())
            while len(self._known) > KNOWN_TIMES:
                self._known.popitem(last=False)
        if self._exact and len(times) > info.length:
            raise DataError(
                f"{video}: has {len(times)} frames, episode {info.id} has {info.length} rows; is it another "
                "episode's? Leave the episode out (episodes.skip)"
            )
        if len(times) <= last:
            raise DataError(
                f"{video}: has {len(times)} frames, episode {info.id} has {info.length} rows; a camera "
                "failed, or the download was cut short: leave the episode out (episodes.skip)"
            )
        return times


def _read_only(values: NDArray[np.float32]) -> NDArray[np.float32]:
    values.flags.writeable = False
    return values
