"""Checks of frames: cameras swapped, turned or in BGR, black or frozen, and video late against the states."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.checks.finding import Finding
from vlafit.datasets.store import EpisodeStore

SIZE = 32  # pixels of the small frames that are compared
BATCH = 64  # frames read at once
FEWEST = 4  # episodes that must agree before one of them is called different
CLEARER = 0.5  # a transformed episode must be this much nearer to the others than it is untransformed
BLACK = 4.0  # mean grey level below which a frame is black
FREEZE = 4  # equal frames in a row, while the robot moves
FURTHEST_SHIFT = 10  # frames by which a video may be late or early
SHIFT_GAIN = 0.1  # correlation that a shift must add to be believed


@dataclass(frozen=True)
class _Clip:
    """The small frames of one camera of one episode."""

    episode: str
    camera: str
    mean: NDArray[np.float32]  # [SIZE, SIZE, 3], over the episode
    change: NDArray[np.float64]  # [T - 1], mean absolute difference of neighbouring frames
    level: NDArray[np.float64]  # [T], mean grey level


def check_pixels(store: EpisodeStore, progress: Callable[[int, int], None] | None = None) -> list[Finding]:
    """Return what is suspicious in the frames. Decodes each frame once."""
    cameras = [camera.name for camera in store.embodiment.cameras]
    clips: dict[str, list[_Clip]] = {camera: [] for camera in cameras}
    speeds = [_speed(store.state(n)) for n in range(len(store.episodes))]
    for number, info in enumerate(store.episodes):
        for camera in cameras:
            clips[camera].append(_clip(store, number, info.id, camera))
        if progress is not None:
            progress(number + 1, len(store.episodes))
    findings: list[Finding] = []
    for camera in cameras:
        for clip, speed in zip(clips[camera], speeds, strict=True):
            findings += _black(clip) + _frozen(clip, speed, clips[camera])
        findings += _late(clips[camera], speeds)
    return findings + _transformed(clips)


def _speed(state: NDArray) -> NDArray[np.float64]:
    """Return how much the state changes at each step [T - 1], each dimension in units of its range."""
    size = np.ptp(state, axis=0)
    steps = np.abs(np.diff(state.astype(np.float64), axis=0))
    return (steps / np.where(size > 0, size, 1)).sum(axis=1)


def _clip(store: EpisodeStore, number: int, episode: str, camera: str) -> _Clip:
    length = store.episodes[number].length
    total, changes, levels = np.zeros((SIZE, SIZE, 3)), [], []
    last: NDArray | None = None
    for first in range(0, length, BATCH):
        frames = store.images(number, list(range(first, min(first + BATCH, length))), camera)
        rows = np.linspace(0, frames.shape[1] - 1, SIZE).round().astype(int)
        columns = np.linspace(0, frames.shape[2] - 1, SIZE).round().astype(int)
        small = frames[:, rows][:, :, columns].astype(np.float64)
        total += small.sum(axis=0)
        levels.append(small.mean(axis=(1, 2, 3)))
        joined = small if last is None else np.concatenate([last[None], small])
        changes.append(np.abs(np.diff(joined, axis=0)).mean(axis=(1, 2, 3)))
        last = small[-1]
    mean = (total / length).astype(np.float32)
    return _Clip(episode, camera, mean, np.concatenate(changes), np.concatenate(levels))


def _black(clip: _Clip) -> list[Finding]:
    dark = np.flatnonzero(clip.level < BLACK)
    if not len(dark):
        return []
    return [
        Finding(
            "error",
            "black_frames",
            clip.episode,
            int(dark[0]),
            f"{len(dark)} of {len(clip.level)} frames of camera {clip.camera!r} are black",
            "the policy is taught to act without seeing",
            "fetch or record the episode again, or leave it out",
        )
    ]


def _frozen(clip: _Clip, speed: NDArray[np.float64], clips: list[_Clip]) -> list[Finding]:
    usual = np.median(np.concatenate([c.change for c in clips]))
    if usual <= 0:
        return []
    moving = speed > 0.5 * np.median(speed)
    still = (clip.change <= 0.02 * usual) & moving
    start, longest, at = 0, 0, 0
    for step, one in enumerate([*still.tolist(), False]):
        if one:
            continue
        if step - start > longest:
            longest, at = step - start, start
        start = step + 1
    if longest < FREEZE:
        return []
    return [
        Finding(
            "error",
            "frozen_frames",
            clip.episode,
            at,
            f"camera {clip.camera!r} repeats one frame for {longest + 1} steps while the robot moves",
            "the image does not belong to the state and the action of its step",
            "leave the episode out, or cut it before the freeze",
        )
    ]


def _late(clips: list[_Clip], speeds: list[NDArray[np.float64]]) -> list[Finding]:
    """Compare when the image changes with when the state does, against the other episodes."""
    curves: dict[str, NDArray[np.float64]] = {}
    for clip, speed in zip(clips, speeds, strict=True):
        if len(speed) < 3 * FURTHEST_SHIFT or np.ptp(speed) == 0 or np.ptp(clip.change) == 0:
            continue
        heights = []
        for shift in range(-FURTHEST_SHIFT, FURTHEST_SHIFT + 1):
            a = speed[max(0, -shift) : len(speed) - max(0, shift)]
            b = clip.change[max(0, shift) : len(clip.change) + min(0, shift)]
            heights.append(np.corrcoef(a, b)[0, 1] if np.ptp(a) > 0 and np.ptp(b) > 0 else 0.0)
        if max(heights) > 0.5:
            curves[clip.episode] = np.asarray(heights)
    if len(curves) < FEWEST:
        return []
    usual = int(np.median([curve.argmax() for curve in curves.values()]))
    shifts = [
        (episode, int(curve.argmax()) - usual)
        for episode, curve in curves.items()
        if curve.max() > curve[usual] + SHIFT_GAIN
    ]
    return [
        Finding(
            "error",
            "video_shift",
            episode,
            None,
            f"camera {clips[0].camera!r} is {abs(shift)} frames {'late' if shift > 0 else 'early'}"
            " against the states, compared with the other episodes",
            "images and actions of a step do not belong together",
            "shift the frames, or leave the episode out",
        )
        for episode, shift in shifts
        if abs(shift) >= 2
    ]


TRANSFORMS: dict[str, tuple[str, Callable[[NDArray], NDArray]]] = {
    "channel_order": ("has red and blue exchanged (BGR)", lambda image: image[..., ::-1]),
    "upside_down": ("is turned by 180 degrees", lambda image: image[::-1, ::-1]),
    "flipped_vertically": ("is mirrored top to bottom", lambda image: image[::-1]),
    "flipped_horizontally": ("is mirrored left to right", lambda image: image[:, ::-1]),
}


def _transformed(clips: dict[str, list[_Clip]]) -> list[Finding]:
    """Find episodes whose mean frame is nearer to the others' when undone what may have happened to it."""
    count = min(map(len, clips.values()), default=0)
    if count < FEWEST:
        return []
    references = {name: np.median([c.mean for c in some], axis=0) for name, some in clips.items()}
    usual = {
        name: float(np.median([_distance(c.mean, references[name]) for c in some]))
        for name, some in clips.items()
    }
    findings = []
    for name, some in clips.items():
        for number, clip in enumerate(some):
            own = _distance(clip.mean, references[name])
            if own <= 2 * usual[name] + 1:
                continue
            options = {
                kind: _distance(undo(clip.mean), references[name]) for kind, (_, undo) in TRANSFORMS.items()
            }
            swaps = {
                other: _distance(clip.mean, references[other])
                for other in clips
                if other != name and _distance(clips[other][number].mean, references[name]) < own
            }
            options |= {f"swapped:{other}": distance for other, distance in swaps.items()}
            kind = min(options, key=lambda k: options[k])
            if options[kind] < CLEARER * own:
                findings.append(_transformation(clip, kind))
    return findings


def _distance(one: NDArray, other: NDArray) -> float:
    return float(np.abs(one - other).mean())


def _transformation(clip: _Clip, kind: str) -> Finding:
    swapped = kind.partition(":")[2]
    what = f"shows what {swapped!r} shows elsewhere" if swapped else TRANSFORMS[kind][0]
    return Finding(
        "error",
        "cameras_swapped" if swapped else kind,
        clip.episode,
        None,
        f"camera {clip.camera!r} {what}, compared with the other episodes",
        "the policy sees one scene in two ways, and is evaluated on one of them",
        "fix the frames of the episode, or leave it out",
    )
