"""Damage of 51 kinds at three severities, one episode at a time: which does `vlafit data check` find?

python -m benchmarks.data_check                # the table (Markdown)
python -m benchmarks.data_check --clean        # only the clean sets, in five layouts on disk: 0 findings

The recordings are of an arm that moves smoothly, seen by two cameras. The damage is to one of eight episodes
in memory, because the check sees a store, whatever its layout.
"""

import argparse
import functools
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.datasets.arm_recordings import (
    HEIGHT,
    SENTENCE,
    STEPS,
    WIDTH,
    Episode,
    Recording,
    recorded,
)
from vlafit.datasets import EpisodeStore, open_dataset
from vlafit.datasets.checks import check_store
from vlafit.datasets.convert import convert

BAD = 5  # the episode that is damaged

# ------------------------------------------------------------------------------------------------ the damages

Damage = Callable[[Episode, float], Episode]


def _scaled(name: str, dimension: int, add: bool = False) -> Damage:
    def damage(e: Episode, size: float) -> Episode:
        values = vars(e)[name].copy()
        spread = values[:, dimension].std()
        values[:, dimension] = values[:, dimension] + size * spread if add else values[:, dimension] * size
        return replace(e, **{name: values})

    return damage


def _rows(change: Callable[[NDArray, int], NDArray], *names: str) -> Damage:
    """Change rows of the arrays called `names`."""
    return lambda e, size: replace(e, **{name: change(vars(e)[name], int(size)) for name in names})


ALL = ("state", "actions", "front", "wrist")


def _fastest(e: Episode, length: int) -> int:
    """Return where the arm moves most in `length` steps."""
    speed = np.abs(np.diff(e.state[:, :2], axis=0)).sum(1)
    return int(np.convolve(speed, np.ones(min(length, len(speed))), "valid").argmax())


def _held(*names: str) -> Damage:
    """Repeat a value for some steps while the arm moves."""

    def damage(e: Episode, size: float) -> Episode:
        start, length, changed = _fastest(e, int(size)), int(size), {}
        for name in names:
            values = vars(e)[name].copy()
            values[start : start + length + 1] = values[start]
            changed[name] = values
        return replace(e, **changed)

    return damage


def _on_some(change: Callable[[NDArray], NDArray], name: str = "front") -> Damage:
    """Change some frames in the middle."""

    def damage(e: Episode, size: float) -> Episode:
        frames = vars(e)[name].copy()
        frames[30 : 30 + int(size)] = change(frames[30 : 30 + int(size)])
        return replace(e, **{name: frames})

    return damage


def _kept(share: float) -> int:
    return round((1 - share) * STEPS)


def _on_share(change: Callable[[NDArray], NDArray], *names: str) -> Damage:
    """Change the last share of an episode's rows."""

    def damage(e: Episode, size: float) -> Episode:
        first = _kept(size)
        changed = {n: np.concatenate([vars(e)[n][:first], change(vars(e)[n][first:])]) for n in names}
        return replace(e, **changed)

    return damage


def _times(*factors: float) -> Callable[[NDArray], NDArray]:
    return lambda rows: rows * np.float32(factors)


def _late(rows: NDArray, steps: int) -> NDArray:
    return np.concatenate([rows[:1].repeat(steps, 0), rows[:-steps]])


def _early(rows: NDArray, steps: int) -> NDArray:
    return np.concatenate([rows[steps:], rows[-1:].repeat(steps, 0)])


def _dropped(e: Episode, size: float) -> Episode:
    start, length = _fastest(e, int(size)), int(size)
    keep = np.r_[0:start, start + length : STEPS]
    return replace(e, **{name: vars(e)[name][keep] for name in ALL})


def _inserted(value: float, name: str) -> Damage:
    def damage(e: Episode, size: float) -> Episode:
        values = vars(e)[name].copy()
        values[7 : 7 + int(size), 1] = value
        return replace(e, **{name: values})

    return damage


def _spike(name: str) -> Damage:
    def damage(e: Episode, size: float) -> Episode:
        values = vars(e)[name].copy()
        values[7, 1] += size * np.abs(values[:, 1] - np.median(values[:, 1])).max()
        return replace(e, **{name: values})

    return damage


def _noise(name: str) -> Damage:
    def damage(e: Episode, size: float) -> Episode:
        values = vars(e)[name]
        noise = np.random.default_rng(0).normal(0, 1, values.shape) * size * values.std(axis=0)
        return replace(e, **{name: (values + noise).astype(np.float32)})

    return damage


def _exchanged(name: str) -> Damage:
    return _on_share(lambda rows: rows[:, [1, 0, 2]], name)


def _zeros(e: Episode, size: float) -> Episode:
    state, actions = e.state.copy(), e.actions.copy()
    state[40 : 40 + int(size)] = actions[40 : 40 + int(size)] = 0
    return replace(e, state=state, actions=actions)


def _blurred(e: Episode, size: float) -> Episode:
    n, frames = int(size), e.front.astype(np.float32)
    for axis in (1, 2):
        frames = np.mean([np.roll(frames, shift, axis) for shift in range(-n, n + 1)], axis=0)
    return replace(e, front=frames.astype(np.uint8))


def _brighter(e: Episode, size: float) -> Episode:
    return replace(e, front=np.clip(e.front + size, 0, 255).astype(np.uint8))


def _random(frames: NDArray) -> NDArray:
    return np.random.default_rng(0).integers(0, 256, frames.shape, dtype=np.uint8)


def _covered(frames: NDArray) -> NDArray:
    frames = frames.copy()
    frames[:, :, : WIDTH // 2] = 3
    return frames


def _shuffled(e: Episode, size: float) -> Episode:
    frames = e.front.copy()
    some = np.arange(20, 20 + int(size))
    frames[some] = frames[np.random.default_rng(1).permutation(some)]
    return replace(e, front=frames)


def _moved(e: Episode, size: float) -> Episode:
    return replace(e, front=np.roll(e.front, (int(size), int(size)), (1, 2)))


def _without(channel: int) -> Callable[[NDArray], NDArray]:
    def change(frames: NDArray) -> NDArray:
        frames = frames.copy()
        frames[..., channel] = 0
        return frames

    return change


def _grey(frames: NDArray) -> NDArray:
    return frames.mean(-1, keepdims=True).repeat(3, -1).astype(np.uint8)


def _shown_twice(e: Episode, size: float) -> Episode:
    """Repeat every k-th frame in the place of the next one: a camera slower than the robot."""
    frames = e.front.copy()
    late = np.arange(1, len(frames), int(size))
    frames[late] = frames[late - 1]
    return replace(e, front=frames)


WHOLE = (0.25, 0.5, 1.0)  # shares of the episode
DAMAGES: dict[str, tuple[Damage, tuple[float, float, float], str]] = {
    # columns
    "sign of the gripper's action turned": (_on_share(_times(1, 1, -1), "actions"), WHOLE, "share"),
    "sign of x's action turned": (_on_share(_times(-1, 1, 1), "actions"), WHOLE, "share"),
    "all signs of actions turned": (_on_share(_times(-1, -1, -1), "actions"), WHOLE, "share"),
    "sign of x's state turned": (_on_share(_times(-1, 1, 1), "state"), WHOLE, "share"),
    "actions late": (_rows(_late, "actions"), (1, 2, 4), "steps"),
    "actions early": (_rows(_early, "actions"), (1, 2, 4), "steps"),
    "states late": (_rows(_late, "state"), (1, 2, 4), "steps"),
    "action is the present state": (
        lambda e, size: _on_share(lambda rows: e.state[-len(rows) :], "actions")(e, size), WHOLE, "share"),
    "x and y of actions exchanged": (_exchanged("actions"), WHOLE, "share"),
    "x and y of states exchanged": (_exchanged("state"), WHOLE, "share"),
    "action x in another unit": (_scaled("actions", 0), (1.3, 2, 1000), "times"),
    "state x in another unit": (_scaled("state", 0), (1.3, 2, 1000), "times"),
    "gripper's action in another range": (_scaled("actions", 2), (1.3, 2, 255), "times"),
    "action x with an offset": (_scaled("actions", 0, add=True), (0.3, 1, 3), "standard deviations"),
    "state x with an offset": (_scaled("state", 0, add=True), (0.3, 1, 3), "standard deviations"),
    "a spike in an action": (_spike("actions"), (2, 10, 100), "times its range"),
    "a spike in a state": (_spike("state"), (2, 10, 100), "times its range"),
    "NaN in actions": (_inserted(np.nan, "actions"), (1, 5, 50), "steps"),
    "infinity in states": (_inserted(np.inf, "state"), (1, 5, 50), "steps"),
    "a hole of zeros": (_zeros, (2, 3, 10), "steps"),
    "noise on actions": (_noise("actions"), (0.03, 0.2, 1), "standard deviations"),
    "noise on states": (_noise("state"), (0.03, 0.2, 1), "standard deviations"),
    "states frozen in motion": (_held("state"), (4, 10, 25), "steps"),
    "actions frozen in motion": (_held("actions"), (4, 10, 25), "steps"),
    "all rows repeated in motion": (_held(*ALL), (4, 10, 25), "steps"),
    "rows dropped in motion": (_dropped, (3, 8, 20), "steps"),
    "action x dead": (_on_share(_times(0, 1, 1), "actions"), WHOLE, "share"),
    "state x dead": (_on_share(_times(0, 1, 1), "state"), WHOLE, "share"),
    "gripper's action dead": (_on_share(_times(1, 1, 0), "actions"), WHOLE, "share"),
    "played backwards": (_on_share(lambda rows: rows[::-1], *ALL), WHOLE, "share"),
    "placeholder sentence": (
        lambda e, size: replace(e, instruction=("do", "TODO", "")[int(size)]), (0, 1, 2), "do, TODO, empty"),
    # frames
    "cameras swapped": (
        lambda e, size: replace(
            e,
            front=np.concatenate([e.front[: _kept(size)], e.wrist[_kept(size) :]]),
            wrist=np.concatenate([e.wrist[: _kept(size)], e.front[_kept(size) :]]),
        ), WHOLE, "share"),
    "BGR": (_on_share(lambda f: f[..., ::-1], "front"), WHOLE, "share"),
    "upside down": (_on_share(lambda f: f[:, ::-1, ::-1], "front"), WHOLE, "share"),
    "mirrored top to bottom": (_on_share(lambda f: f[:, ::-1], "front"), WHOLE, "share"),
    "mirrored left to right": (_on_share(lambda f: f[:, :, ::-1], "front"), WHOLE, "share"),
    "black frames": (_on_some(lambda f: f * 0), (1, 5, 40), "frames"),
    "white frames": (_on_some(lambda f: f * 0 + 255), (1, 5, 40), "frames"),
    "frames of noise (decoded wrongly)": (_on_some(_random), (1, 5, 40), "frames"),
    "frames frozen in motion": (_held("front"), (3, 6, 20), "frames"),
    "video late": (_rows(_late, "front"), (1, 2, 4), "frames"),
    "video early": (_rows(_early, "front"), (1, 2, 4), "frames"),
    "frames out of order": (_shuffled, (4, 10, 40), "frames"),
    "frames shown twice": (_shown_twice, (8, 4, 2), "every n-th"),
    "half of the camera covered": (_on_share(_covered, "front"), WHOLE, "share"),
    "colour lost": (_on_share(_grey, "front"), WHOLE, "share"),
    "a colour channel lost": (_on_share(_without(0), "front"), WHOLE, "share"),
    "brighter": (_brighter, (15, 40, 90), "grey levels"),
    "out of focus": (_blurred, (1, 3, 8), "pixels"),
    "camera moved": (_moved, (2, 6, 16), "pixels"),
    # episodes
    "a copy of another episode": (lambda e, size: e, (0, 0, 0), "values and frames; values; frames"),
}  # fmt: skip


@functools.cache
def _clean(seed: int) -> tuple[Episode, ...]:
    return tuple(recorded(seed))


COLUMNS = list(DAMAGES)[: list(DAMAGES).index("cameras swapped")]  # found without decoding a frame


def damaged(name: str, level: int, seed: int) -> Recording:
    """Return the recordings with one damaged episode."""
    episodes = list(_clean(seed))
    if name == "a copy of another episode":
        other = episodes[2]
        columns, frames = {"state": other.state, "actions": other.actions}, {"front": other.front}
        changes = ({**columns, **frames, "wrist": other.wrist}, columns, frames)[level]
        episodes[BAD] = replace(episodes[BAD], **changes)
    else:
        damage, sizes, _ = DAMAGES[name]
        episodes[BAD] = damage(episodes[BAD], sizes[level])
    return Recording(episodes)


def clean_sets(folder: Path) -> dict[str, EpisodeStore]:
    """Return clean recordings in five layouts on disk."""
    import h5py

    sets: dict[str, EpisodeStore] = {}
    for number, (name, to, video) in enumerate(
        [("LIBERO HDF5", "libero", ""), ("LeRobot PNG", "lerobot", ""), ("LeRobot H.264", "lerobot", "h264")]
    ):
        out = folder / f"set_{number}"
        convert(Recording(recorded(10 + number)), out, to, video=video)
        sets[name] = open_dataset(str(out / "card.toml"))
    for number, name in enumerate(("ALOHA", "robomimic"), 13):
        root = folder / f"set_{number}"
        root.mkdir()
        episodes = recorded(number)
        camera_key = "observations/images/{}" if name == "ALOHA" else "obs/{}_image"
        state_key, action_key = ("observations/qpos", "action") if name == "ALOHA" else ("obs/at", "actions")
        for n, e in enumerate(episodes):
            path = root / f"episode_{n}.hdf5" if name == "ALOHA" else root / "all.hdf5"
            with h5py.File(path, "a") as file:
                group = file if name == "ALOHA" else file.require_group("data").create_group(f"demo_{n}")
                group[state_key], group[action_key] = e.state, e.actions
                for camera in ("front", "wrist"):
                    group[camera_key.format(camera)] = vars(e)[camera]
        (root / "card.toml").write_text(_card_text(name, root, camera_key, state_key, action_key))
        sets[name] = open_dataset(str(root / "card.toml"))
    return sets


def _card_text(name: str, root: Path, camera: str, state: str, action: str) -> str:
    lines = [
        f'name = "{name}"', f'layout = "{name.lower()}"',
        f'path = "{root if name == "ALOHA" else root / "all.hdf5"}"',
        "[instruction]", 'source = "card"', f'text = "{SENTENCE}"',
        "[robot]", 'name = "arm"', "hz = 20", 'control = "position"',
    ]  # fmt: skip
    for column, key in (("state", state), ("action", action)):
        labels = 'labels = ["x", "y", "gripper"]'
        lines += [f"[robot.{column}]", f'keys = ["{key}"]', "dimensions = 3", labels]
    for name in ("front", "wrist"):
        lines += ["[[robot.cameras]]", f'name = "{name}"', f'key = "{camera.format(name)}"']
        lines += [f"height = {HEIGHT}", f"width = {WIDTH}"]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Print which damage is found at which severity; the exit status is 1 for findings in a clean set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clean", action="store_true", help="check only the clean sets")
    parser.add_argument("--seeds", type=int, default=1, help="recordings on which each damage must be found")
    parser.add_argument("--only", default="", help="only damages with this word in their name")
    options = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, store in clean_sets(Path(folder)).items() if not options.only else ():
            findings = check_store(store).findings
            wrong += len(findings)
            print(f"clean, {name}: {len(findings)} findings", *(f.message for f in findings[:3]), sep="\n  ")
    if options.clean:
        return int(wrong > 0)
    print(f"\n| damage | in | {' | '.join(('slight', 'middle', 'severe'))} | found as |")
    print("|---|---|---|---|---|---|")
    blamed, found = 0, 0
    for name, (_, sizes, unit) in DAMAGES.items():
        if options.only not in name:
            continue
        cells, kinds = [], set()
        for level, size in enumerate(sizes):
            hits = 0
            for seed in range(options.seeds):
                findings = check_store(damaged(name, level, seed), pixels=name not in COLUMNS).findings
                hits += any(f.episode == f"episode_{BAD}" for f in findings)
                others = [f for f in findings if f.episode not in ("", f"episode_{BAD}")]
                blamed += len(others)
                for finding in others:
                    print(f"blamed: {name} {size:g}: {finding}", file=sys.stderr)
                kinds |= {f.kind for f in findings}
            found += hits == options.seeds
            cells.append(f"**{size:g}**" if hits == options.seeds else f"{size:g}")
        print(f"| {name} | {unit} | {' | '.join(cells)} | {', '.join(sorted(kinds)) or '-'} |", flush=True)
    count = len(DAMAGES)
    print(f"\n{found} of {3 * count} found (bold); {blamed} findings blame an episode that is not damaged")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
