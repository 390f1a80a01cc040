"""How often `vlafit data check` finds a video that is late in one of few episodes, and blames a clean one.

python -m benchmarks.video_shift                       # small scenes, and random choices of metaworld-faucet
python -m benchmarks.video_shift --sets 40 --shifts    # more sets, only clean ones

Rows of the table: sets of episodes; findings in clean ones; sets in which the shifted episode was found, by
frames of shift; other episodes blamed in these; and what the check says it would not find.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import numpy as np

from tests.datasets import small_scenes
from tests.datasets.arm_recordings import Recording
from vlafit.datasets import open_dataset
from vlafit.datasets.checks.catalogue import Untested
from vlafit.datasets.checks.clips import Clip, measure
from vlafit.datasets.checks.curves import Track
from vlafit.datasets.checks.late import check_shift
from vlafit.datasets.checks.motion import scale_of
from vlafit.datasets.store import EpisodeStore


def tracks_of(store: EpisodeStore, camera: str) -> list[Track]:
    """Return the measurements of a camera of all episodes."""
    states = [store.state(n) for n in range(len(store.episodes))]
    scale = scale_of(states)
    return [
        _track(measure(store, n, camera, lambda _: None), states[n], scale.steps(states[n]))
        for n in range(len(states))
    ]


def _track(clip: Clip, state: np.ndarray, speed: np.ndarray) -> Track:
    return Track(clip.episode, state, clip.features, clip.change, speed)


def scenes(path: small_scenes.Path, noise: float, seed: int, episodes: int) -> list[Track]:
    """Return the tracks of a set of small scenes."""
    return tracks_of(Recording([small_scenes.scene(path, n, seed, noise) for n in range(episodes)]), "front")


def late(track: Track, frames: int) -> Track:
    """Return a track whose video is some frames late; the first frame stands for those that are missing."""
    features = np.concatenate([track.features[:1].repeat(frames, 0), track.features[:-frames]])
    still = np.full(frames, np.quantile(track.change, 0.1))
    return replace(track, features=features, change=np.concatenate([still, track.change[:-frames]]))


def row(name: str, sets: Sequence[Sequence[Track]], shifts: Sequence[int]) -> str:
    """Return a row of the table."""
    clean, others, found, said = 0, 0, Counter[int](), Counter[str]()
    for number, tracks in enumerate(sets):
        untested, bad = Untested(), number % len(tracks)
        clean += len(check_shift("camera", tracks, untested))
        for gap in untested.listed():
            said[gap.reason if gap.reason.startswith("fewer") else "any shift"] += 1
        for frames in shifts:
            damaged = [*tracks[:bad], late(tracks[bad], frames), *tracks[bad + 1 :]]
            blamed = [finding.episode for finding in check_shift("camera", damaged, Untested())]
            found[frames] += tracks[bad].episode in blamed
            others += len(set(blamed) - {tracks[bad].episode})
    episodes = sum(map(len, sets))
    cells = " | ".join(f"{found[frames]}" for frames in shifts)
    gaps = "; ".join(f"{text} ({count})" for text, count in said.items()) or "-"
    return f"| {name} | {len(sets)} | {clean} of {episodes} | {cells} | {others} | {gaps} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sets", type=int, default=6)
    parser.add_argument("--episodes", type=int, default=9, help="of a set of small scenes")
    parser.add_argument("--shifts", type=int, nargs="*", default=[4, 8, 12])
    options = parser.parse_args()
    heads = [
        "scenes",
        "sets",
        "clean episodes blamed",
        *(f"{s} late" for s in options.shifts),
        "others blamed",
        "not tested",
    ]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for path in get_args(small_scenes.Path):
        for noise in (0.0, 3.0):
            sets = [scenes(path, noise, seed, options.episodes) for seed in range(options.sets)]
            print(row(f"{path}, noise {noise:g}", sets, options.shifts), flush=True)
    store = open_dataset("metaworld-faucet")
    everything = tracks_of(store, store.embodiment.cameras[0].name)
    for count in (6, 8, 12, 20):
        rng = np.random.default_rng(count)
        chosen = [rng.choice(len(everything), count, replace=False) for _ in range(2 * options.sets)]
        sets = [[everything[n] for n in some] for some in chosen]
        print(row(f"{count} episodes of metaworld-faucet", sets, options.shifts), flush=True)


if __name__ == "__main__":
    main()
