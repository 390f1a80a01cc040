"""Find episodes whose camera is turned, mirrored, in BGR, or exchanged with another camera."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.card import CameraCard
from vlafit.datasets.checks.catalogue import Untested
from vlafit.datasets.checks.clips import Clip
from vlafit.datasets.checks.finding import Finding

FEWEST = 4  # episodes that must agree before one of them is called different
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
    """Find episodes whose mean frame is nearer to the others' when undone what may have happened to it."""
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
    findings = []
    for name, some in clips.items():
        for number, clip in enumerate(some):
            own = _distance(clip.mean, references[name])
            if own <= _room(usual[name]):
                continue
            options = {
                kind: _distance(undo(clip.mean), references[name]) for kind, (_, undo) in TRANSFORMS.items()
            }
            for other in (other for other in clips if other != name):
                exchanged = _as_other(clip.mean, declared[name], declared[other])
                turned = _as_other(clips[other][number].mean, declared[other], declared[name])
                if _distance(turned, references[name]) < own:
                    options[f"swapped:{other}"] = _distance(exchanged, references[other])
            kind = min(options, key=lambda k: options[k])
            if options[kind] < CLEARER * own:
                findings.append(_transformation(clip, kind))
    return findings


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


def _transformation(clip: Clip, kind: str) -> Finding:
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
        (clip.camera, swapped) if swapped else (clip.camera,),
    )
