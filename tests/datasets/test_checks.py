"""`vlafit data check`: no finding on clean recordings, and each kind of damage in the right episode."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.datasets import hdf5_writers
from tests.datasets.arm_recordings import EPISODES, STEPS, Episode, Recording, recorded
from tests.datasets.layouts import demos, in_file_order
from tests.datasets.lerobot_files import write
from tests.variants import variants
from vlafit.cli import console, main
from vlafit.datasets import open_dataset
from vlafit.datasets.bench import Bench
from vlafit.datasets.checks import Finding, check_store, late, pixels
from vlafit.datasets.checks.catalogue import Untested
from vlafit.datasets.checks.clips import measure, measured
from vlafit.datasets.checks.curves import Track
from vlafit.datasets.checks.motion import scale_of
from vlafit.errors import VlafitError

BAD = 5  # the episode that is damaged


def flipped_gripper(e: Episode) -> Episode:
    return replace(e, actions=e.actions * np.float32([1, 1, -1]))


def lagging(steps: int) -> Callable[[Episode], Episode]:
    def damage(e: Episode) -> Episode:
        return replace(e, actions=np.concatenate([e.actions[:1].repeat(steps, 0), e.actions[:-steps]]))

    return damage


def present_state(e: Episode) -> Episode:
    return replace(e, actions=e.state.copy())


def swapped(e: Episode) -> Episode:
    return replace(e, front=e.wrist, wrist=e.front)


def on_frames(change: Callable[[NDArray], NDArray]) -> Callable[[Episode], Episode]:
    return lambda e: replace(e, front=change(e.front))


def shifted(steps: int) -> Callable[[NDArray], NDArray]:
    return lambda frames: np.concatenate([frames[:1].repeat(steps, 0), frames[:-steps]])


def freeze(steps: int) -> Callable[[Episode], Episode]:
    def damage(e: Episode) -> Episode:
        speed = np.abs(np.diff(e.state[:, :2], axis=0)).sum(1)
        start = int(np.convolve(speed, np.ones(steps), "valid").argmax())
        frames = e.front.copy()
        frames[start : start + steps + 1] = frames[start]
        return replace(e, front=frames)

    return damage


def spiked(e: Episode) -> Episode:
    actions = e.actions.copy()
    actions[7, 1] = 900
    return replace(e, actions=actions)


def no_number(e: Episode) -> Episode:
    actions = e.actions.copy()
    actions[7, 1] = np.nan
    return replace(e, actions=actions)


def blackened(frames: NDArray) -> NDArray:
    dark = frames.copy()
    dark[30:40] = 0
    return dark


DAMAGES: list[tuple[str, Callable[[Episode], Episode], str]] = [
    ("gripper sign flipped", flipped_gripper, "action_sign"),
    ("action lags 3", lagging(3), "action_lag"),
    ("action lags 5", lagging(5), "action_lag"),
    ("action is the state", present_state, "action_equals_state"),
    ("cameras swapped", swapped, "cameras_swapped"),
    ("BGR", on_frames(lambda f: f[..., ::-1]), "channel_order"),
    ("upside-down", on_frames(lambda f: f[:, ::-1, ::-1]), "upside_down"),
    ("mirrored", on_frames(lambda f: f[:, ::-1]), "flipped_vertically"),
    ("video late by 4", on_frames(shifted(4)), "video_shift"),
    ("video late by 6", on_frames(shifted(6)), "video_shift"),
    ("half a second frozen", freeze(10), "frozen_frames"),
    ("black frames", on_frames(blackened), "black_frames"),
    ("a spike", spiked, "spike"),
    ("a value that is no number", no_number, "not_finite"),
]


@pytest.mark.parametrize("seed", variants(range(3), always=[0]))
@pytest.mark.parametrize(("damage", "kind"), [d[1:] for d in DAMAGES], ids=[d[0] for d in DAMAGES])
def test_one_damaged_episode_is_found_by_its_kind_and_no_other_is_blamed(
    damage: Callable[[Episode], Episode], kind: str, seed: int
):
    episodes = recorded(seed)
    episodes[BAD] = damage(episodes[BAD])
    findings = check_store(Recording(episodes)).findings
    assert kind in {f.kind for f in findings}
    assert {f.episode for f in findings} == {f"episode_{BAD}"}
    assert all(f.severity == "error" and f.message and f.effect and f.fix for f in findings)


@pytest.mark.parametrize("value", [1e6, -1e8, 1e30])
def test_two_wild_values_of_few_rows_do_not_hide_each_other(value: float):
    episodes = [
        replace(e, state=e.state[:9], actions=e.actions[:9].copy(), front=e.front[:9], wrist=e.wrist[:9])
        for e in recorded(0)
    ]
    for number in (1, 4):
        episodes[number].actions[3, 1] = value
    assert 0.01 * sum(len(e.actions) for e in episodes) < 2  # else 99 % of the values are the usual ones
    spikes = [f for f in check_store(Recording(episodes)).findings if f.kind == "spike"]
    assert [(f.episode, f.step) for f in spikes] == [("episode_1", 3), ("episode_4", 3)]
    assert all(f"is {value:.4g}, 99 % of its values are within" in f.message for f in spikes)
    assert all(float(f.message.split("within ")[1].split()[0]) < 100 for f in spikes)


@pytest.mark.parametrize("seed", variants(range(6), always=[0, 1]))
def test_nothing_is_found_in_clean_recordings(seed: int):
    assert check_store(Recording(recorded(seed))).findings == ()


def _times(column: str, dimension: int, factor: float, add: float = 0.0) -> Callable[[Episode], Episode]:
    def damage(e: Episode) -> Episode:
        values = vars(e)[column].copy()
        values[:, dimension] = values[:, dimension] * factor + add
        return replace(e, **{column: values})

    return damage


def _held(column: str) -> Callable[[Episode], Episode]:
    def damage(e: Episode) -> Episode:
        values = vars(e)[column].copy()
        start = 1 + int(np.abs(np.diff(e.state[:70, :2], axis=0)).sum(1).argmax())
        values[start : start + 11] = values[start]
        return replace(e, **{column: values})

    return damage


def _without_rows(e: Episode) -> Episode:
    speed = np.abs(np.diff(e.state[:, :2], axis=0)).sum(1)
    start = int(np.convolve(speed, np.ones(20), "valid").argmax())
    keep = np.r_[0:start, start + 20 : STEPS]
    return Episode(e.state[keep], e.actions[keep], e.front[keep], e.wrist[keep])


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (_times("actions", 0, 1.3), "scale"),
        (_times("state", 0, 1000), "scale"),
        (_times("state", 1, 1, 0.3), "offset"),
        (_times("actions", 2, 0), "dead_dimension"),
        (_times("state", 0, 0), "dead_dimension"),
        (_held("state"), "repeated_rows"),
        (_without_rows, "jump"),
    ],
)
def test_an_episode_whose_columns_relate_or_step_otherwise_than_the_others_is_found(
    damage: Callable[[Episode], Episode], kind: str
):
    episodes = recorded()
    episodes[BAD] = damage(episodes[BAD])
    findings = check_store(Recording(episodes), pixels=False).findings
    assert kind in {f.kind for f in findings}
    assert {f.episode for f in findings} == {f"episode_{BAD}"}


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda f: np.clip(f.astype(int) + 40, 0, 255).astype(np.uint8), "looks_different"),
        (lambda f: f.mean(-1, keepdims=True).repeat(3, -1).astype(np.uint8), "looks_different"),
        (lambda f: np.concatenate([f[:40], 255 - f[40:]]), "cut"),
        (lambda f: f[np.arange(STEPS) // 2 * 2], "repeated_frames"),
    ],
)
def test_an_episode_whose_frames_look_otherwise_than_the_others_is_found(
    change: Callable[[NDArray], NDArray], kind: str
):
    episodes = recorded()
    episodes[BAD] = on_frames(change)(episodes[BAD])
    findings = check_store(Recording(episodes)).findings
    assert kind in {f.kind for f in findings}
    assert {f.episode for f in findings} == {f"episode_{BAD}"}


def test_the_video_of_another_episode_is_found():
    episodes = recorded()
    episodes[BAD] = replace(episodes[BAD], front=episodes[2].front, wrist=episodes[2].wrist)
    kinds = {(f.kind, f.episode) for f in check_store(Recording(episodes)).findings}
    assert ("duplicate_frames", f"episode_{BAD}") in kinds


def test_actions_that_come_late_in_every_episode_are_found():
    findings = check_store(Recording([lagging(4)(e) for e in recorded()]), pixels=False).findings
    assert [(f.kind, f.episode) for f in findings] == [("action_lag", "")]


def test_a_duplicated_episode_and_a_placeholder_sentence_are_found():
    episodes = recorded()
    episodes[6] = episodes[2]
    findings = check_store(
        Recording([replace(e, instruction="TODO") for e in episodes]), pixels=False
    ).findings
    assert [(f.kind, f.episode) for f in findings if f.severity == "error"] == [
        ("duplicate_episode", "episode_6")
    ]
    assert sum(f.kind == "placeholder_task" for f in findings) == EPISODES


def test_frames_of_a_dark_scene_are_a_warning_and_missing_ones_an_error():
    def darkened(level: int) -> list[Finding]:
        episodes = [on_frames(lambda f: (f // 64).astype(np.uint8) * level)(e) for e in recorded()[:4]]
        return list(check_store(Recording(episodes)).findings)

    dark = [f for f in darkened(1) if f.kind in ("dark_frames", "black_frames")]
    assert {(f.severity, f.kind) for f in dark} == {("warning", "dark_frames")} and len(dark) == 4
    assert "mean level of" in dark[0].message
    black = [f for f in darkened(0) if f.kind in ("dark_frames", "black_frames")]
    assert {(f.severity, f.kind) for f in black} == {("error", "black_frames")}


def test_values_beyond_the_limits_of_the_card_and_rows_of_zeros_are_found():
    episodes = [replace(e, actions=e.actions.copy(), state=e.state.copy()) for e in recorded()]
    episodes[2].actions[7, 0] = 3
    episodes[4].state[40:50] = 0
    episodes[4].actions[40:50] = 0
    episodes[5].state[:] = episodes[5].actions[:] = 0  # allocated, never written
    store = Recording(episodes)
    limited = replace(store.card.robot.action, low=(-1, -1, -1), high=(1, 1, 1.5))
    store.card = replace(store.card, robot=replace(store.card.robot, action=limited))
    found = {(f.kind, f.episode): f for f in check_store(store, pixels=False).findings}
    assert found["outside_limits", "episode_2"].step == 7
    assert "x is 3" in found["outside_limits", "episode_2"].message
    assert found["zero_rows", "episode_4"].step == 40
    whole = found["zero_rows", "episode_5"]
    assert (
        whole.severity == "error"
        and f"in {len(episodes[5].state)} of {len(episodes[5].state)} steps" in whole.message
    )


@pytest.mark.slow
def test_nothing_is_late_in_the_sample_that_ships_and_a_shifted_video_in_it_is_found():
    store = open_dataset("metaworld-faucet")
    camera = store.embodiment.cameras[0].name
    tracks, scale = [], scale_of([store.state(n) for n in range(len(store.episodes))])
    for n, info in enumerate(store.episodes):
        clip = measure(store, n, camera, lambda frames: None)
        speed = scale.steps(store.state(n))
        tracks.append(Track(info.id, store.state(n), clip.features, clip.change, speed))
    assert late.check_shift(camera, tracks, Untested()) == []
    assert check_store(store, pixels=False).findings == ()
    for number, shift in ((3, 4), (100, 6)):
        features = tracks[number].features
        damaged = np.concatenate([features[:1].repeat(shift, 0), features[:-shift]])
        some = [*tracks[:number], replace(tracks[number], features=damaged), *tracks[number + 1 :]]
        findings = late.check_shift(camera, some, Untested())
        assert [f.episode for f in findings] == [tracks[number].episode]
        assert f"{shift} frames late" in findings[0].message


class Counting(Recording):
    """A recording that counts the frames which are read."""

    read = 0

    def images(self, episode: int, steps: Sequence[int], camera: str) -> NDArray[np.uint8]:
        self.read += len(steps)
        return super().images(episode, steps, camera)


def test_a_check_that_was_stopped_goes_on_and_finds_what_one_in_memory_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("VLAFIT_CACHE", str(tmp_path / "cache"))
    episodes = recorded()
    episodes[BAD] = replace(freeze(6)(episodes[BAD]), wrist=episodes[BAD].wrist[..., ::-1])
    expected = pixels.check_pixels(Recording(episodes), untested=Untested())
    assert {finding.kind for finding in expected} >= {"frozen_frames", "channel_order"}
    total = 2 * EPISODES * STEPS

    def stop(done: int, of: int) -> None:
        assert of == total
        if done >= total // 2:
            raise KeyboardInterrupt

    first, second = Counting(episodes), Counting(episodes)
    with pytest.raises(KeyboardInterrupt):
        pixels.check_pixels(first, stop, fewest=total, untested=Untested())
    seen: list[int] = []
    again = pixels.check_pixels(second, lambda done, _: seen.append(done), fewest=total, untested=Untested())
    assert again == expected
    assert total // 2 <= second.read <= total // 2 + STEPS and seen[-1] == total
    assert not [p for p in (tmp_path / "cache" / "checks").rglob("*") if p.is_file()]  # it is done


def test_two_checks_of_a_large_dataset_at_once_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLAFIT_CACHE", str(tmp_path / "cache"))
    store = Recording(recorded(episodes=2))
    with measured(store, None, fewest=1), pytest.raises(VlafitError, match="another vlafit data check"):
        pixels.check_pixels(store, fewest=1, untested=Untested())


def test_measurements_that_are_damaged_are_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLAFIT_CACHE", str(tmp_path / "cache"))
    store = Counting(recorded(episodes=2))
    with pytest.raises(RuntimeError), measured(store, None, fewest=1):
        raise RuntimeError
    (damaged,) = (tmp_path / "cache" / "checks").glob("*/0/level.npy")
    damaged.write_bytes(damaged.read_bytes()[:40])
    with measured(store, None, fewest=1) as again, measured(Recording(recorded(episodes=2)), None) as clips:
        assert store.read == 2 * 2 * STEPS + 2 * STEPS  # one camera's again
        for ours, theirs in zip(
            again["front"] + again["wrist"], clips["front"] + clips["wrist"], strict=True
        ):
            assert np.array_equal(ours.level, theirs.level) and np.array_equal(ours.features, theirs.features)


def test_progress_goes_to_stderr_with_what_remains_only_where_it_takes_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    write(tmp_path / "set", in_file_order(demos(3)))
    assert main(["data", "check", str(tmp_path / "set")]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(console, "QUIET_EVERY_S", 0.0)
    assert main(["data", "check", str(tmp_path / "set")]) == 0
    shown = capsys.readouterr()
    assert "frames 4/60" in shown.err and "left" in shown.err and "4/60" not in shown.out


def test_bench_says_which_number_of_workers_suits(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write(tmp_path / "set", in_file_order(demos(3)))
    assert main(["data", "bench", str(tmp_path / "set"), "--seconds", "0.1", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["samples"] > 0 and facts["samples_per_s"] > 0
    assert Bench(4000, 1.0, 0.5).workers(8) == 0  # reading costs less than handing over
    assert Bench(300, 1.0, 0.9).workers(8) == 4 and Bench(300, 1.0, 0.9).workers(2) == 1


@pytest.mark.parametrize("seconds", ["0", "-1", "nan"])
def test_bench_refuses_a_time_in_which_nothing_is_read(seconds: str, capsys: pytest.CaptureFixture[str]):
    assert main(["data", "bench", "metaworld-faucet", f"--seconds={seconds}"]) == 2
    assert "argument --seconds: must be a number from 0.1" in capsys.readouterr().err


def test_a_layout_by_its_dotted_path_is_described_and_looked_into(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write(tmp_path / "set", in_file_order(demos(3)))
    layout = "vlafit.datasets.layouts.lerobot"
    assert main(["data", "card", str(tmp_path / "set"), "--layout", layout]) == 0
    assert 'path = "' in capsys.readouterr().out
    assert main(["data", "card", str(tmp_path / "set"), "--layout", "vlafit.datasets.layouts.aloha"]) == 2
    assert "is not of layout" in capsys.readouterr().err


def test_a_dataset_that_needs_a_card_is_inspected_and_its_card_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    hdf5_writers.aloha_encoded(tmp_path / "set", in_file_order(demos(3)))
    assert main(["data", "inspect", str(tmp_path / "set")]) == 0
    shown = capsys.readouterr().out
    assert "6 episodes, 30 frames" in shown
    for key in ("instruction.text", "robot.cameras.0.channels"):
        assert f"the card must say {key}" in shown
    assert main(["data", "card", str(tmp_path / "set")]) == 0
    text = capsys.readouterr().out
    assert "# FILL IN: " in text and 'channels = ""' in text
    (tmp_path / "my.toml").write_text(text)
    assert main(["data", "check", str(tmp_path / "my.toml"), "--json"]) == 2
    capsys.readouterr()
    filled = text.replace('channels = ""', 'channels = "bgr"').replace('text = ""', 'text = "do it"')
    (tmp_path / "my.toml").write_text(filled)
    assert main(["data", "check", str(tmp_path / "my.toml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["errors"] == 0


def test_errors_come_first():
    episodes = [replace(e, instruction="todo") for e in [*recorded()[:7], spiked(recorded()[7])]]
    findings = check_store(Recording(episodes), pixels=False).findings
    assert findings[0].severity == "error" and findings[-1].severity == "warning"


# ------------------------------------------------------------------------------------------- the command line


def test_the_verbs_exit_0_when_clean_1_on_errors_and_2_when_it_cannot_be_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    everything = in_file_order(demos(3))
    write(tmp_path / "set", everything)
    assert main(["data", "check", str(tmp_path / "set"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["dataset"], facts["errors"], facts["findings"]) == ("set", 0, [])
    write(tmp_path / "twice", [*everything, everything[0]])
    assert main(["data", "check", str(tmp_path / "twice"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["errors"] == 1 and found["findings"][0]["episode"] == "episode_000006"
    (tmp_path / "set" / "meta" / "tasks.parquet").unlink()
    assert main(["data", "check", str(tmp_path / "set"), "--json"]) == 2
    assert "tasks.parquet" in capsys.readouterr().err


def test_stats_show_the_digits_in_which_values_far_from_zero_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    many = [replace(one, position=1000 + 0.01 * one.position) for one in demos(3)]
    write(tmp_path / "set", many)
    assert main(["data", "stats", str(tmp_path / "set")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("state")]
    for d, (_, _, mean, std, low, q01, q99, high) in enumerate(lines[:3]):
        rows = np.concatenate([one.position[:, d] for one in many]).astype(np.float32)
        assert float(low) < float(q01) < float(mean) < float(q99) < float(high)
        assert abs(float(low) - rows.min()) < float(std) / 100 > abs(float(high) - rows.max())


def test_inspect_stats_and_card_say_what_the_dataset_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write(tmp_path / "set", in_file_order(demos(3)))
    assert main(["data", "inspect", str(tmp_path / "set"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["layout"], facts["episodes"], facts["frames"], facts["hz"]) == ("lerobot", 6, 30, 20)
    assert main(["data", "inspect", str(tmp_path / "set")]) == 0
    shown = capsys.readouterr().out
    assert "6 episodes, 30 frames" in shown and "camera front: 6x5" in shown
    assert len(shown.splitlines()) < 24  # one screen
    assert main(["data", "stats", str(tmp_path / "set"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"]["count"] == 30
    assert main(["data", "card", str(tmp_path / "set")]) == 0
    (tmp_path / "my.toml").write_text(capsys.readouterr().out)
    assert "# GUESS:" in (tmp_path / "my.toml").read_text()
    assert main(["data", "inspect", str(tmp_path / "my.toml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == facts
    assert main(["data", "chekc", str(tmp_path / "set")]) == 2
    assert "did you mean 'check'" in capsys.readouterr().err
