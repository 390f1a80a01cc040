"""Compare the look of a camera's frames between episodes: another scene, cuts, repeated frames, no focus."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlafit.datasets.checks.catalogue import Untested
from vlafit.datasets.checks.finding import Finding

FEWEST = 4  # episodes of one sentence that must agree before one of them is called different
LEAST_DISTANCE = 6.0  # grey levels that the mean frame must be away from the others
DISTANCE = 3.0  # times that it must be further away than nine of ten episodes
LEAST_CUT = 8.0  # grey levels by which the frame must change in one step
CUT = 4.0  # times that it must change more than in nine of ten episodes
BLURRED = 0.7  # of the usual sharpness
WIDE = 8.0  # times that sharpness must be further from the median than it usually is
STILL = 0.02  # of the usual change: a frame that repeats the one before
LEAST_STILL = 0.1  # share of repeated frames that is reported


@dataclass(frozen=True)
class Look:
    """Measurements of one camera of one episode."""

    episode: str
    instruction: str
    mean: NDArray[np.float32]  # [h, w, 3], over the episode
    change: NDArray[np.float64]  # [T - 1], mean absolute difference of neighbouring frames
    sharpness: float
    speed: NDArray[np.float64]  # [T - 1], of the state
    frames: str
    """Hash of all frames; empty if nothing moves in them."""
    states: str
    """Hash of all states."""


def check_looks(camera: str, looks: Sequence[Look], untested: Untested) -> list[Finding]:
    """Return the episodes whose frames look otherwise than those of other episodes with their sentence."""
    where = f"camera {camera!r}"
    if len(looks) < 2:
        untested.add("duplicate_frames", f"{len(looks)} episode", where)
    elif not any(look.frames for look in looks):
        untested.add("duplicate_frames", "its image never changes", where)
    findings = _same_video(camera, looks)
    copies = {finding.episode for finding in findings}
    groups: dict[str, list[Look]] = {}
    for look in looks:
        groups.setdefault(look.instruction, []).append(look)
    for sentence, group in groups.items():
        if len(group) < FEWEST:
            for test in ("looks", "repeated_frames"):
                untested.add(test, f"fewer than {FEWEST} episodes have the sentence", f"{sentence!r}")
            continue
        findings += _scene(camera, group) + _cuts(camera, group)
        findings += _repeats(camera, group, untested) + _focus(camera, group)
    return [f for f in findings if f.kind == "duplicate_frames" or f.episode not in copies]


def _scene(camera: str, group: Sequence[Look]) -> list[Finding]:
    reference = np.median([look.mean for look in group], axis=0)
    away = np.asarray([float(np.abs(look.mean - reference).mean()) for look in group])
    limit = max(LEAST_DISTANCE, DISTANCE * float(np.quantile(away, 0.9, method="lower")))
    return [
        Finding(
            "warning",
            "looks_different",
            look.episode,
            None,
            f"the mean frame of camera {camera!r} is {distance:.0f} grey levels away from that of most "
            f"episodes, others {float(np.median(away)):.0f}{_colours(look.mean, reference)}",
            "the policy sees another scene, or the same one in another light or colour",
            "look at the episode (camera moved, covered, another exposure or colour?), or leave it out",
            (camera,),
        )
        for look, distance in zip(group, away, strict=True)
        if distance > limit
    ]


def _colours(mean: NDArray, reference: NDArray) -> str:
    change = (mean - reference).mean(axis=(0, 1))
    named = ", ".join(
        f"{name} {value:+.0f}" for name, value in zip(("red", "green", "blue"), change, strict=True)
    )
    return f" ({named})"


def _cuts(camera: str, group: Sequence[Look]) -> list[Finding]:
    largest = np.asarray([float(look.change.max(initial=0.0)) for look in group])
    limit = max(LEAST_CUT, CUT * float(np.quantile(largest, 0.9, method="lower")))
    return [
        Finding(
            "warning",
            "cut",
            look.episode,
            int(look.change.argmax()),
            f"the frame of camera {camera!r} changes by {size:.0f} grey levels in one step, in the other "
            f"episodes by {float(np.median(largest)):.0f} at most",
            "some frames do not belong to this episode, or were decoded wrongly",
            "look at the frames there; cut the episode, or leave it out",
            (camera,),
        )
        for look, size in zip(group, largest, strict=True)
        if size > limit
    ]


def _repeats(camera: str, group: Sequence[Look], untested: Untested) -> list[Finding]:
    changes = np.concatenate([look.change for look in group])
    speed = float(np.concatenate([look.speed for look in group]).mean())
    if not changes.any() or speed <= 0:
        reason = "its image never changes" if speed > 0 else "the state does not move by more than its noise"
        untested.add("repeated_frames", reason, f"camera {camera!r}")
        return []
    usual = float(np.median(changes[changes > 0]))
    shares = []
    for look in group:
        moving = look.speed > 0.5 * speed
        shares.append(float((look.change[moving] <= STILL * usual).mean()) if moving.any() else 0.0)
    limit = LEAST_STILL + 2 * float(np.quantile(shares, 0.9, method="lower"))
    return [
        Finding(
            "warning",
            "repeated_frames",
            look.episode,
            None,
            f"camera {camera!r} repeats the frame before in {share:.0%} of the steps in motion, in the other "
            f"episodes in {float(np.median(shares)):.0%}",
            "images are older than the state and the action of their step",
            "look at the recorder (a camera slower than the robot?), or leave the episode out",
            (camera,),
        )
        for look, share in zip(group, shares, strict=True)
        if share > limit
    ]


def _focus(camera: str, group: Sequence[Look]) -> list[Finding]:
    sharpness = np.asarray([look.sharpness for look in group])
    usual = float(np.median(sharpness))
    spread = float(np.median(np.abs(sharpness - usual)))
    return [
        Finding(
            "warning",
            "blurred",
            look.episode,
            None,
            f"neighbouring pixels of camera {camera!r} differ by {look.sharpness:.2g} grey levels, in the "
            f"other episodes by {usual:.2g}",
            "the policy sees less than it will on the robot",
            "look at the episode (out of focus, a dirty lens?), or leave it out",
            (camera,),
        )
        for look in group
        if look.sharpness < BLURRED * usual and usual - look.sharpness > WIDE * spread
    ]


def _same_video(camera: str, looks: Sequence[Look]) -> list[Finding]:
    findings: list[Finding] = []
    seen: dict[str, Look] = {}
    for look in looks:
        other = seen.get(look.frames) if look.frames else None
        if other is not None and other.states != look.states:  # else the whole episode is there twice
            findings.append(
                Finding(
                    "error",
                    "duplicate_frames",
                    look.episode,
                    None,
                    f"every frame of camera {camera!r} is that of episode {other.episode}",
                    "the images do not belong to the states and actions of one of the two",
                    "fetch the video of this episode, or leave both out",
                    (camera,),
                    other=other.episode,
                )
            )
        seen.setdefault(look.frames, look)
    return findings
