"""Find episodes, or parts of them, whose camera is turned, mirrored, in BGR, or exchanged with another."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.card import CameraCard
from vlafit.datasets.checks.catalogue import Untested
from vlafit.datasets.checks.clips import PARTS, Clip, part_starts
from vlafit.datasets.checks.finding import Finding

FEWEST = 4  # episodes that must agree before one of them is called different
RUN = 2  # parts in a row
SAMPLE = 512  # episodes whose parts say how parts look
SHOWING = 0.75  # share of the parts in which a transformation must show, else it is said
CLEARER = 0.5  # a transformed episode must be this much nearer to the others than it is untransformed

TRANSFORMS: dict[str, tuple[str, Callable[[NDArray], NDArray]]] = {
    "channel_order": ("has red and blue exchanged (BGR)", lambda image: image[..., ::-1]),
    "upside_down": ("is turned by 180 degrees", lambda image: image[::-1, ::-1]),
    "flipped_vertically": ("is mirrored top to bottom", lambda image: image[::-1]),
    "flipped_horizontally": ("is mirrored left to right", lambda image: image[:, ::-1]),
}


WORDS = {
    "channel_order": "BGR",
    "upside_down": "upside down",
    "flipped_vertically": "mirrored top to bottom",
    "flipped_horizontally": "mirrored left to right",
}


def check_views(
    clips: Mapping[str, Sequence[Clip]], cameras: Sequence[CameraCard], untested: Untested
) -> list[Finding]:
    """Find episodes whose frames are nearer to the others' when undone what may have happened to them.

    The mean frame of an episode is compared with those of the others, and that of each of its parts with the
    others' at the same time.
    """
    count = min(map(len, clips.values()), default=0)
    if count < FEWEST:
        for test in ("orientation", "cameras_swapped"):
            untested.add(test, f"the number of episodes is {count}")
        return []
    declared = {camera.name: camera for camera in cameras}
    references = {name: np.median([c.mean for c in some], axis=0) for name, some in clips.items()}
    usual = {
        name: float(np.median([_distance(c.mean, references[name]) for c in some]))
        for name, some in clips.items()
    }
    _note_alike(declared, references, usual, untested)
    at_times = {name: _at_times(some) for name, some in clips.items()}
    findings = []
    for name, some in clips.items():
        rooms = _room(usual[name]), _room(_usual_of_parts(some, at_times[name]))
        _note_hidden_parts(name, some, at_times[name], rooms[1], untested)
        for number, clip in enumerate(some):
            others = {other: clips[other][number] for other in clips if other != name}
            mean = _kinds(clip.mean[None], {n: c.mean[None] for n, c in others.items()}, name, declared,
                          {n: r[None] for n, r in references.items()}, rooms[0])[0]  # fmt: skip
            kinds = _kinds(
                clip.parts, {n: c.parts for n, c in others.items()}, name, declared, at_times, rooms[1]
            )
            found = _runs(kinds)
            whole = any(steps == PARTS for _, _, steps in found)
            if mean and (whole or not found):
                findings.append(_transformation(clip, mean))
                continue
            findings += [_in_part(clip, kind, first, parts) for kind, first, parts in found]
    return findings


def _at_times(clips: Sequence[Clip]) -> NDArray[np.float32]:
    """Return the usual mean frame of each part [PARTS, SIZE, SIZE, 3]."""
    some = np.linspace(0, len(clips) - 1, min(len(clips), SAMPLE)).round().astype(int)
    return np.stack(
        [np.median([clips[n].parts[part] for n in some], axis=0) for part in range(PARTS)]
    ).astype(np.float32)


def _usual_of_parts(clips: Sequence[Clip], at_times: NDArray) -> float:
    return float(np.median([_distances(clip.parts, at_times) for clip in clips[:SAMPLE]]))


def _kinds(
    frames: NDArray,
    others: Mapping[str, NDArray],
    name: str,
    declared: Mapping[str, CameraCard],
    references: Mapping[str, NDArray],
    room: float,
) -> list[str]:
    """Return what happened to each frame [n, SIZE, SIZE, 3] of camera `name`, "" for nothing that is clear.

    `others` are the frames of the other cameras, `references` the usual ones of all.
    """
    own = _distances(frames, references[name])
    options = {
        kind: _distances(np.stack([undo(frame) for frame in frames]), references[name])
        for kind, (_, undo) in TRANSFORMS.items()
    }
    for other, theirs in others.items():
        exchanged = np.stack([_as_other(frame, declared[name], declared[other]) for frame in frames])
        turned = np.stack([_as_other(frame, declared[other], declared[name]) for frame in theirs])
        nearer = _distances(turned, references[name]) < own
        options[f"swapped:{other}"] = np.where(nearer, _distances(exchanged, references[other]), np.inf)
    best = [min(options, key=lambda kind, n=n: options[kind][n]) for n in range(len(frames))]
    return [
        kind if own[n] > room and options[kind][n] < CLEARER * own[n] else "" for n, kind in enumerate(best)
    ]


def _runs(kinds: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return the runs of one kind that are long enough: kind, first part, parts."""
    found, first = [], 0
    for part in range(1, len(kinds) + 1):
        if part == len(kinds) or kinds[part] != kinds[first]:
            if kinds[first] and part - first >= RUN:
                found.append((kinds[first], first, part - first))
            first = part
    return found


def _note_hidden_parts(
    name: str, clips: Sequence[Clip], at_times: NDArray, room: float, untested: Untested
) -> None:
    """Note what would be found in too few parts of the episodes."""
    hidden = []
    for kind, (_, undo) in TRANSFORMS.items():
        shows = []
        for clip in clips[:SAMPLE]:
            changed = _distances(np.stack([undo(frame) for frame in clip.parts]), at_times)
            shows.append((changed > room) & (_distances(clip.parts, at_times) < CLEARER * changed))
        if np.mean(shows) < SHOWING:
            hidden.append(WORDS[kind])
    if hidden:
        reason = f"in a part of an episode it would not be found when {' or '.join(hidden)}"
        untested.add("orientation", reason, f"camera {name!r}")


def _distances(frames: NDArray, others: NDArray) -> NDArray[np.float64]:
    return np.abs(frames.astype(np.float32) - others).mean(axis=(1, 2, 3), dtype=np.float64)


def _as_other(mean: NDArray, camera: CameraCard, other: CameraCard) -> NDArray:
    """Return a frame that was read as `camera` declares it as it is when read as `other` does.

    Both only turn, mirror and exchange channels, which undo themselves.
    """
    stored = camera.upright(np.rint(mean).astype(np.uint8))
    return other.upright(stored).astype(np.float32)


def _room(usual: float) -> float:
    """Return the distance from the reference below which an episode is like the others."""
    return 2 * usual + 1


def _note_alike(
    declared: Mapping[str, CameraCard],
    references: Mapping[str, NDArray],
    usual: Mapping[str, float],
    untested: Untested,
) -> None:
    """Note what cannot be found because the mean frame hardly changes by it."""
    for name, reference in references.items():
        room = _room(usual[name])
        alike = [
            kind for kind, (_, undo) in TRANSFORMS.items() if _distance(undo(reference), reference) <= room
        ]
        if alike:
            spread = f"its mean frames differ by {usual[name]:.1f} grey levels"
            reason = f"{spread}, and hardly by more when {' or '.join(WORDS[k] for k in alike)}"
            untested.add("orientation", reason, f"camera {name!r}")
    pairs = [(one, other) for n, one in enumerate(references) for other in list(references)[:n]]
    if not pairs:
        untested.add("cameras_swapped", "there is one camera")
    for one, other in pairs:
        shown = _as_other(references[other], declared[other], declared[one])
        if _distance(references[one], shown) <= _room(usual[one]):
            untested.add("cameras_swapped", "their mean frames are alike", f"cameras {other!r} and {one!r}")


def _distance(one: NDArray, other: NDArray) -> float:
    return float(np.abs(one - other).mean())


def _what(kind: str) -> tuple[str, str]:
    """Return the kind of finding, and what is said of the camera."""
    swapped = kind.partition(":")[2]
    return (
        ("cameras_swapped", f"shows what {swapped!r} shows elsewhere")
        if swapped
        else (kind, TRANSFORMS[kind][0])
    )


def _in_part(clip: Clip, kind: str, first: int, parts: int) -> Finding:
    starts = part_starts(len(clip.level))
    start, end = int(starts[first]), int(starts[first + parts])
    return _transformation(clip, kind, (start, end))


def _transformation(clip: Clip, kind: str, steps: tuple[int, int] | None = None) -> Finding:
    swapped, (name, what) = kind.partition(":")[2], _what(kind)
    where = f" from about step {steps[0]} to {steps[1] - 1}" if steps else ""
    return Finding(
        "error",
        name,
        clip.episode,
        steps[0] if steps else None,
        f"camera {clip.camera!r} {what}{where}, compared with the other episodes",
        "the policy sees one scene in two ways, and is evaluated on one of them",
        f"fix the frames of {'these steps' if steps else 'the episode'}, or leave it out",
        (clip.camera, swapped) if swapped else (clip.camera,),
        steps=steps[1] - steps[0] if steps else 1,
    )
