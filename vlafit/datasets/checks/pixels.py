"""Checks of frames: cameras swapped, turned or in BGR, black or frozen, and video late against the states."""

import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.checks import late, looks, order, same_cameras, views
from vlafit.datasets.checks.catalogue import Untested
from vlafit.datasets.checks.clips import FEWEST_FRAMES, PARTS, Clip, measured
from vlafit.datasets.checks.curves import Track
from vlafit.datasets.checks.finding import Finding
from vlafit.datasets.checks.freezes import check_freezes
from vlafit.datasets.checks.motion import scale_of
from vlafit.datasets.store import EpisodeStore
from vlafit.errors import DataError

BLACK = 4.0  # mean grey level (of 255) below which a frame is dark
LIT = 16.0  # median level of an episode from which on a dark frame in it is missing
WRONG_FRAMES = {
    *views.TRANSFORMS,
    "cameras_swapped",
    "black_frames",
    "frozen_frames",
    "frames_out_of_order",
    "repeated_frames",
    "duplicate_frames",
    "looks_different",
    "cut",
    "blurred",
}  # kinds that explain why a camera does not change as the state moves
PIXEL_TESTS = (
    "unreadable_frames",
    "black_frames",
    "frozen_frames",
    "frames_out_of_order",
    "video_shift",
    "orientation",
    "cameras_swapped",
    "same_cameras",
    "looks",
    "repeated_frames",
    "duplicate_frames",
)


def check_pixels(
    store: EpisodeStore,
    progress: Callable[[int, int], None] | None = None,
    fewest: int = FEWEST_FRAMES,
    *,
    untested: Untested,
) -> list[Finding]:
    """Return what is suspicious in the frames. Decodes each frame once; see `clips.measured` for `fewest`.

    An episode with a frame that cannot be read is a finding, and left out of all other tests of frames.
    """
    unreadable: dict[int, DataError] = {}
    with measured(store, progress, fewest, unreadable) as clips:
        damaged = [_unreadable(store.episodes[number].id, error) for number, error in unreadable.items()]
        rest = [number for number in range(len(store.episodes)) if number not in unreadable]
        return damaged + _findings(Chosen(store, rest) if damaged else store, clips, untested)


def _unreadable(episode: str, error: DataError) -> Finding:
    return Finding(
        "error",
        "unreadable_frames",
        episode,
        None,
        f"a frame cannot be read: {error}",
        "training stops when it comes to this frame, perhaps after hours",
        f'fetch or record it again, or leave it out: skip = ["{episode}"] below [episodes] of a card',
    )


class Chosen(EpisodeStore):
    """Some episodes of a store."""

    def __init__(self, store: EpisodeStore, numbers: Sequence[int]) -> None:
        self.card, self._store, self._numbers = store.card, store, tuple(numbers)
        self.episodes = tuple(store.episodes[number] for number in numbers)

    def state(self, episode: int) -> NDArray[np.float32]:
        return self._store.state(self._numbers[episode])

    def actions(self, episode: int) -> NDArray[np.float32]:
        return self._store.actions(self._numbers[episode])

    def image(self, episode: int, step: int, camera: str) -> NDArray[np.uint8]:
        return self._store.image(self._numbers[episode], step, camera)


def _findings(store: EpisodeStore, clips: dict[str, list[Clip]], untested: Untested) -> list[Finding]:
    states = [store.state(n) for n in range(len(store.episodes))]
    if not states:
        for test in PIXEL_TESTS:
            untested.add(test, "there is no episode")
        return []
    scale = scale_of(states)
    speeds = [scale.steps(state) for state in states]
    findings: list[Finding] = []
    shuffled: list[Finding] = []
    for camera, some in clips.items():
        for clip in some:
            findings += _black(clip)
        findings += check_freezes(camera, some, states, scale, untested)
        tracks = [
            Track(clip.episode, state, clip.features, clip.change, speed)
            for clip, state, speed in zip(some, states, speeds, strict=True)
        ]
        findings += late.check_shift(camera, tracks, untested)
        shuffled += order.check_order(camera, some, untested)
    findings += same_cameras.check_same_cameras(clips, untested)
    findings += views.check_views(clips, store.card.robot.cameras, untested)
    others = list(findings)
    lengths = {info.id: info.length for info in store.episodes}
    for camera in clips:
        findings += [
            finding
            for finding in looks.check_looks(camera, _looks(store, clips[camera], speeds), untested)
            if not _explained(finding, others, lengths)
        ]
    other_frames = {f.episode for f in findings if f.kind in ("black_frames", "cut", "looks_different")}
    findings += [f for f in shuffled if f.episode not in other_frames]
    wrong = {(f.episode, camera) for f in findings if f.kind in WRONG_FRAMES for camera in f.cameras}
    return [f for f in findings if f.kind != "video_mismatch" or (f.episode, *f.cameras) not in wrong]


def _looks(store: EpisodeStore, clips: list[Clip], speeds: list[NDArray[np.float64]]) -> list[looks.Look]:
    made = []
    for number, (clip, speed) in enumerate(zip(clips, speeds, strict=True)):
        frames = hashlib.sha256(clip.features.tobytes()).hexdigest() if clip.change.any() else ""
        states = hashlib.sha256(np.ascontiguousarray(store.state(number)).tobytes()).hexdigest()
        sentence = store.episodes[number].instruction
        made.append(
            looks.Look(clip.episode, sentence, clip.mean, clip.change, clip.sharpness, speed, frames, states)
        )
    return made


def _explained(finding: Finding, others: Sequence[Finding], lengths: Mapping[str, int]) -> bool:
    """Whether another finding of the episode says more of the same."""
    others = [other for other in others if other.episode == finding.episode]
    kinds = {other.kind for other in others}
    same = {*views.TRANSFORMS, "cameras_swapped"}
    missing = {"black_frames", "dark_frames", "frozen_frames"}
    if finding.kind == "cut" and any(
        _begins_or_ends(other, finding, lengths[finding.episode]) for other in others if other.kind in same
    ):
        return True
    return bool(
        kinds & {"looks_different": same | missing, "blurred": same | missing}.get(finding.kind, missing)
    )


def _begins_or_ends(part: Finding, cut: Finding, length: int) -> bool:
    """Whether a camera is found turned from a cut on, or up to it."""
    if part.step is None or cut.step is None or not set(cut.cameras) <= set(part.cameras):
        return False
    room = -(-length // PARTS)
    return min(abs(cut.step - part.step), abs(cut.step - part.step - part.steps)) <= room


def speed_of(state: NDArray) -> NDArray[np.float64]:
    """Return how much the state changes at each step [T - 1], each dimension in units of its range."""
    state = np.nan_to_num(state, nan=0.0, posinf=0.0, neginf=0.0)  # another check names such values
    size = np.ptp(state, axis=0)
    steps = np.abs(np.diff(state.astype(np.float64), axis=0))
    return (steps / np.where(size > 0, size, 1)).sum(axis=1)


def _black(clip: Clip) -> list[Finding]:
    dark = np.flatnonzero(clip.level < BLACK)
    if not len(dark):
        return []
    usual = float(np.median(clip.level))
    missing = usual >= LIT or not clip.level.any()  # dark among lit frames, or nothing but zeros
    what = (
        f"{len(dark)} of {len(clip.level)} frames of camera {clip.camera!r} are darker than {BLACK:g} of 255 "
        f"(the darkest has a mean level of {clip.level.min():.1f}, the episode's median is {usual:.1f})"
    )
    if missing:
        effect, fix = "the policy is taught to act without seeing", "fetch or record the episode again"
    else:
        effect, fix = "little can be seen in them", "look at the episode (a cap on the lens, a dark scene?)"
    return [
        Finding(
            "error" if missing else "warning",
            "black_frames" if missing else "dark_frames",
            clip.episode,
            int(dark[0]),
            what,
            effect,
            f"{fix}, or leave it out",
            (clip.camera,),
            steps=int(np.ptp(dark)) + 1,
        )
    ]
