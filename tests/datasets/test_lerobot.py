"""LeRobot datasets: what LeRobot's own reader returned, and the traps of the three formats."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from tests.datasets.layouts import Demo, demos, in_file_order
from tests.datasets.lerobot_files import FPS, write
from vlafit.codec import Statistics
from vlafit.datasets import EpisodeStore, blocks_for_statistics, load_card, open_dataset
from vlafit.datasets.layouts import lerobot
from vlafit.datasets.lerobot import index, tables
from vlafit.datasets.lerobot import store as reader
from vlafit.datasets.video import VideoFile
from vlafit.errors import DataError

FIXTURES = Path(__file__).parents[1] / "fixtures" / "lerobot_datasets"
STARTS = (0, 12, 21, 36, 43)  # of the recorded episodes


def recorded(name: str) -> tuple[EpisodeStore, dict[str, Any], dict[str, np.ndarray]]:
    folder = FIXTURES / f"expected_{name}"
    facts = json.loads((folder / "expected.json").read_text())
    return open_dataset(FIXTURES / name), facts, load_file(folder / "expected.safetensors")


def at(index: int) -> tuple[int, int]:
    episode = max(n for n, start in enumerate(STARTS) if start <= index)
    return episode, index - STARTS[episode]


# ----------------------------------------------------------------------------- what LeRobot's reader returned


@pytest.mark.parametrize("name", ["image", "video_h264"])
def test_states_actions_chunks_padding_histories_and_tasks_are_those_that_lerobot_read(name: str):
    store, facts, arrays = recorded(name)
    assert [info.length for info in store.episodes] == facts["lens"]
    assert store.embodiment.hz == facts["fps"]
    for row in facts["rows"]:
        episode, step = at(row["index"])
        assert (episode, step) == (row["episode_index"], row["frame_index"])
        sample = store.sample(episode, step, chunk=8, history=2)
        np.testing.assert_array_equal(sample.observation.state, np.float32(row["state"]))
        np.testing.assert_array_equal(store.actions(episode)[step], np.float32(row["action"]))
        assert sample.observation.instruction == row["task"]
        key = f"chunk.{row['index']}"
        np.testing.assert_array_equal(sample.actions, arrays[f"{key}.action"])
        np.testing.assert_array_equal(~sample.is_real, arrays[f"{key}.action_is_pad"])
        seen = [*sample.observation.past, sample.observation]
        padded = [seen[0]] * (2 - len(seen)) + seen
        np.testing.assert_array_equal([o.state for o in padded], arrays[f"{key}.state"])
        assert [n < 2 - len(seen) for n in range(2)] == arrays[f"{key}.state_is_pad"].tolist()


def test_images_are_those_that_lerobot_read_bit_for_bit():
    store, facts, _ = recorded("image")
    for row in facts["rows"]:
        for camera in ("front", "wrist"):
            frame = np.ascontiguousarray(store.image(*at(row["index"]), camera))
            assert hashlib.sha256(frame.tobytes()).hexdigest() == row[camera]["sha256_hwc_u8"]


def test_video_frames_are_within_two_grey_levels_of_those_that_lerobot_read():
    store, facts, arrays = recorded("video_h264")
    compared = 0
    for row in facts["rows"]:
        for camera in ("front", "wrist"):
            frame = store.image(*at(row["index"]), camera)
            np.testing.assert_allclose(frame.mean((0, 1)), row[camera]["mean_rgb"], atol=2)
            expected = arrays.get(f"frame.{row['index']}.{camera}")
            if expected is not None:
                compared += 1
                assert np.abs(frame.astype(int) - expected).max() <= 2
    assert compared == 6


@pytest.mark.parametrize("name", ["image", "video_h264"])
def test_statistics_of_the_rows_are_those_that_lerobot_wrote(name: str):
    store, facts, _ = recorded(name)
    ids = [info.id for info in store.episodes]
    blocks = blocks_for_statistics([store], [ids], 8)
    for key, made in zip(("observation.state", "action"), map(Statistics.of_blocks, blocks), strict=True):
        for statistic in ("mean", "std", "min", "max"):
            np.testing.assert_allclose(made.array(statistic), facts["stats"][key][statistic], atol=1e-6)


def test_a_dataset_needs_no_card():
    card = load_card(FIXTURES / "image")
    assert card.layout == "lerobot" and card.name == "image"
    assert card.embodiment.hz == 10 and card.embodiment.name == "toy"
    assert [(c.name, c.shape) for c in card.embodiment.cameras] == [
        ("front", (48, 64, 3)),
        ("wrist", (48, 64, 3)),
    ]
    assert card.embodiment.state.labels[-1] == "gripper" and card.embodiment.action.shape == (6,)
    assert (card.expect.episodes, card.expect.frames) == (5, 53)


# ----------------------------------------------------------------------------- the formats, images and video

EVERYTHING = in_file_order(demos(3))


def same(store: EpisodeStore, everything: list[Demo]) -> None:
    for number, demo in enumerate(everything):
        np.testing.assert_array_equal(store.state(number), demo.state)
        np.testing.assert_array_equal(store.actions(number), demo.actions.astype(np.float32))
        assert store.episodes[number].instruction == demo.instruction


@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
def test_every_format_reads_as_it_was_written(version: str, tmp_path: Path):
    store = open_dataset(write(tmp_path / "set", EVERYTHING, version))
    same(store, EVERYTHING)
    for number, demo in enumerate(EVERYTHING):
        for step in range(len(demo.actions)):
            np.testing.assert_array_equal(store.image(number, step, "front"), demo.front[step])
            np.testing.assert_array_equal(store.image(number, step, "wrist"), demo.wrist[step])


def coloured(lengths: tuple[int, ...] = (9, 4, 7, 12, 5)) -> list[Demo]:
    """Demonstrations whose frames tell their episode and step after lossy coding: 64x48, flat grey levels."""
    made = []
    for episode, length in enumerate(lengths):
        levels = (np.arange(length) * 17 + episode * 5) % 200 + 25
        front = np.broadcast_to(levels[:, None, None, None], (length, 48, 64, 3)).astype(np.uint8)
        rows = np.random.default_rng(episode).normal(size=(length, 9)).astype(np.float32).astype(np.float64)
        wrist = 255 - front
        made.append(Demo("turn_it", rows[:, :3], rows[:, 3:5], rows[:, 5:], front, wrist))
    return made


CODECS = [name for name in ("libx264", "libsvtav1", "libx265") if name in av.codecs_available]


def on_video(
    folder: Path, version: str, codec: str, section: lerobot.Section | None = None, **changes: Any
) -> EpisodeStore:
    card = replace(write(folder, coloured(), version, codec=codec, **changes), section=section)
    cameras = tuple(replace(c, height=48, width=64) for c in card.robot.cameras)
    return open_dataset(replace(card, robot=replace(card.robot, cameras=cameras)))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_a_video_gives_the_frame_of_each_step_in_any_order(version: str, codec: str, tmp_path: Path):
    store = on_video(tmp_path / "set", version, codec)
    everything = coloured()
    places = [(n, step) for n, demo in enumerate(everything) for step in range(len(demo.actions))]
    np.random.default_rng(0).shuffle(places)
    for number, step in [*places, *sorted(places)]:
        for camera, frames in (("front", everything[number].front), ("wrist", everything[number].wrist)):
            difference = np.abs(store.image(number, step, camera).astype(int) - frames[step])
            assert difference.max() <= 4, (number, step, camera)  # neighbours differ by 17
    several = store.images(3, [7, 0, 3, 3], "front")
    assert np.abs(several.astype(int) - everything[3].front[[7, 0, 3, 3]]).max() <= 4


def test_all_three_codecs_can_be_written_here_so_that_they_are_tested():
    assert len(CODECS) == 3


def test_rows_stamped_by_a_jittering_clock_keep_the_order_of_the_frames(tmp_path: Path):
    def drifting(length: int) -> np.ndarray:
        return np.arange(length) / FPS * 1.3  # two frames late at step 7

    with pytest.raises(DataError, match=r"episode 0: row 1 .*0\.065 s.*fps 20.*tolerance_s.*here 0\.015"):
        on_video(tmp_path / "strict", "v3.0", "libx264", stamps=drifting)
    meant = lerobot.Section(tolerance_s=0.02)
    store = on_video(tmp_path / "set", "v3.0", "libx264", meant, stamps=drifting)
    for number, demo in enumerate(coloured()):
        for step in (len(demo.actions) - 1, 0):
            frame = store.image(number, step, "front").astype(int)
            assert np.abs(frame - demo.front[step]).max() <= 4


def test_a_video_that_is_too_short_is_refused_naming_file_and_episode(tmp_path: Path):
    store = on_video(tmp_path / "set", "v2.1", "libx264")
    film = tmp_path / "set" / "videos" / "chunk-000" / "observation.images.front" / "episode_000003.mp4"
    store.close()
    shutil.copy(film.with_name("episode_000001.mp4"), film)  # 4 frames for an episode of 12
    with pytest.raises(DataError, match=r"episode_000003\.mp4: has 4 frames, episode 3 has 12 rows .*front"):
        open_dataset(store.card)


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_gaps_in_the_episode_numbers_keep_their_numbers(version: str, tmp_path: Path):
    numbers = [0, 2, 3, 7, 8, 20]
    store = open_dataset(write(tmp_path / "set", EVERYTHING, version, numbers=numbers))
    assert [e.id for e in store.episodes] == [f"episode_{n:06d}" for n in numbers]
    same(store, EVERYTHING)
    chosen = replace(store.card, section=lerobot.Section(episodes=(2, 7, 20), skip=(7,)))
    some = open_dataset(chosen)
    assert [e.id for e in some.episodes] == ["episode_000002", "episode_000020"]
    np.testing.assert_array_equal(some.state(1), EVERYTHING[5].state)
    with pytest.raises(DataError, match=r"skip.*not there: \[1\]"):
        open_dataset(replace(store.card, section=lerobot.Section(skip=(1,))))


# ------------------------------------------------------------------------------------------------ metadata

NAMES: list[tuple[Any, tuple[str, ...]]] = [
    (None, ()),
    (["a", "b"], ("a", "b")),
    ([["a", "b"]], ("a", "b")),
    ({"axes": ["a", "b"]}, ("a", "b")),
    ({"motors": ["a", "b"]}, ("a", "b")),
    ({"left": ["a"], "right": ["b"]}, ("a", "b")),
    ({"b": 1, "a": 0}, ("a", "b")),
]


@pytest.mark.parametrize(("names", "expected"), NAMES)
def test_names_of_dimensions_are_read_however_they_nest(names: object, expected: tuple[str, ...]):
    assert lerobot.labels(names) == expected


def change_info(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "meta" / "info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


ORDERS: list[tuple[tuple[str, ...], tuple[str, ...], str]] = [
    # labels of the card, keys, and what the error says; the files have x, y, z, finger_left, finger_right
    (("y", "x", "z", "finger_left", "finger_right"), ("observation.state",), "y is dimension 1"),
    (("X.pos", "Y.pos", "Z.pos", "finger_left", "finger_right"), ("observation.state",), ""),
    (("a", "b", "c", "d", "e"), ("observation.state",), ""),
    (("a", "b", "c", "finger_right", "finger_left"), ("observation.state",), "finger_right is dimension 4"),
    (
        ("finger_left", "finger_right", "x", "y", "z"),
        ("observation.state[:, 3:]", "observation.state[:, :3]"),
        "",
    ),
    (
        ("finger_left", "finger_right", "z", "y", "x"),
        ("observation.state[:, 3:]", "observation.state[:, :3]"),
        "z is dimension 4",
    ),
]


@pytest.mark.case(
    section="data",
    report="columns under another joint's name",
    user_has="a card whose labels are in another order than the names in LeRobot's info.json",
    now="refused when the dataset is opened, with both lists",
)
@pytest.mark.parametrize(("given", "keys", "fact"), ORDERS)
def test_labels_in_another_order_than_the_files_are_refused_with_both(
    given: tuple[str, ...], keys: tuple[str, ...], fact: str, tmp_path: Path
):
    made = write(tmp_path / "set", EVERYTHING)
    state = replace(made.robot.state, keys=keys, labels=given)
    wanted = replace(made, robot=replace(made.robot, state=state))
    if not fact:
        open_dataset(wanted)
        return
    with pytest.raises(DataError) as error:
        open_dataset(wanted)
    for word in (fact, ", ".join(given), "info.json", "finger_left, finger_right"[:11]):
        assert word in str(error.value)


def test_another_rate_than_that_of_the_files_is_refused_with_both(tmp_path: Path):
    made = write(tmp_path / "set", EVERYTHING)
    with pytest.raises(DataError, match=r"fps 20, the card robot.hz 10"):
        open_dataset(replace(made, robot=replace(made.robot, hz=10.0)))


def test_axes_of_a_camera_are_told_by_their_names(tmp_path: Path):
    write(tmp_path / "set", EVERYTHING)

    def channels_first(info: dict[str, Any]) -> None:
        feature = info["features"]["observation.images.front"]
        feature["shape"], feature["names"] = [3, 6, 5], ["channels", "height", "width"]

    change_info(tmp_path / "set", channels_first)
    assert open_dataset(tmp_path / "set").image(0, 0, "front").shape == (6, 5, 3)


def test_a_depth_map_is_never_read_as_a_camera(tmp_path: Path):
    card = write(tmp_path / "set", EVERYTHING)

    def depth(info: dict[str, Any]) -> None:
        info["features"]["observation.images.front"]["info"] = {"video.is_depth_map": True}

    change_info(tmp_path / "set", depth)
    assert [c.name for c in load_card(tmp_path / "set").robot.cameras] == ["wrist"]
    with pytest.raises(DataError, match=r"'front'.*depth map"):
        open_dataset(card)


def lfs(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


DATA = "data/chunk-000/file-000.parquet"
FAULTS: list[tuple[str, Callable[[Path], object], str]] = [
    ("no info", lambda f: (f / "meta/info.json").unlink(), "recognises|info.json"),
    (
        "info is no JSON",
        lambda f: (f / "meta/info.json").write_text("{"),
        r"info\.json.*JSON",
    ),
    ("another version", lambda f: change_info(f, lambda i: i.update(codebase_version="v9.0")), "'v9.0'"),
    ("v2.1 with v3.0's files", lambda f: change_info(f, lambda i: i.update(codebase_version="v2.1")), "v2.1"),
    ("fps 0", lambda f: change_info(f, lambda i: i.update(fps=0)), "fps is 0"),
    (
        "total is wrong",
        lambda f: change_info(f, lambda i: i.update(total_episodes=7)),
        r"meta/info\.json: total_episodes is 7, but the episodes in meta/ are 6 with",
    ),
    (
        "frames are wrong",
        lambda f: change_info(f, lambda i: i.update(total_frames=7)),
        r"meta/info\.json: total_frames is 7",
    ),
    ("data file missing", lambda f: (f / DATA).unlink(), r"file-000\.parquet.*missing.*episode 0"),
    ("data file is a pointer", lambda f: lfs(f / DATA), "Git LFS pointer"),
    ("data file empty", lambda f: (f / DATA).write_bytes(b""), r"file-000\.parquet.*empty"),
    ("data file cut", lambda f: (f / DATA).write_bytes((f / DATA).read_bytes()[:-9]), "no whole parquet"),
    ("no tasks", lambda f: (f / "meta/tasks.parquet").unlink(), r"tasks\.parquet.*missing"),
    ("names do not fit", lambda f: change_info(f, one_name), "observation.state has 1 names for 5"),
    ("action is 2-D", lambda f: change_info(f, flat_action), "action has shape"),
    ("state is missing", lambda f: change_info(f, lambda i: i["features"].pop("observation.state")), "state"),
]


def one_name(info: dict[str, Any]) -> None:
    info["features"]["observation.state"]["names"] = ["x"]


def flat_action(info: dict[str, Any]) -> None:
    info["features"]["action"]["shape"] = [2, 2]


@pytest.mark.parametrize(("damage", "message"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_a_damaged_dataset_is_refused_when_opened_saying_where(
    damage: Callable[[Path], object], message: str, tmp_path: Path
):
    write(tmp_path / "set", EVERYTHING)
    damage(tmp_path / "set")
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(tmp_path / "set")
    assert str(tmp_path / "set") in str(caught.value) or "'set'" in str(caught.value)


def change_rows(folder: Path, name: str, change: Callable[[list], None]) -> None:
    table = pq.read_table(folder / DATA)
    values = table[name].to_pylist()
    change(values)
    position = table.column_names.index(name)
    kind = table.schema.field(name).type
    import pyarrow as pa

    pq.write_table(table.set_column(position, name, pa.array(values, kind)), folder / DATA)


def put(at: int, value: Any) -> Callable[[list], None]:
    def change(values: list) -> None:
        values[at] = value

    return change


ROWS: list[tuple[str, Any, str]] = [
    ("episode_index", put(3, 1), "episode 0 has 3 rows, the metadata says 4|not in order"),
    ("frame_index", put(2, 7), "episode 0: frame_index"),
    ("task_index", put(1, 1), "episode 0 has 2 tasks"),
    ("task_index", lambda v: v.__setitem__(slice(0, 4), [9] * 4), "task_index 9 is not among the 2 tasks"),
    ("timestamp", put(1, float("nan")), "episode 0: a timestamp"),
    ("timestamp", put(2, 0.05), r"file-000.*episode 0: row 2 .*0\.05 s.*must increase"),
    ("timestamp", put(2, 0.1002), r"file-000.*episode 0: row 2 has timestamp 0\.1002 .*fps 20 \(0\.05 s\)"),
    ("timestamp", lambda v: v.reverse(), r"file-000.*episode 0: row \d+ .*must increase"),
    ("timestamp", lambda v: v.__setitem__(slice(None), [2 * t for t in v]), "row 1 .*0.1 s apart.*fps 20"),
]


@pytest.mark.parametrize(("name", "change", "message"), ROWS)
def test_rows_that_contradict_the_metadata_are_refused_naming_the_episode(
    name: str, change: Callable[[list], None], message: str, tmp_path: Path
):
    write(tmp_path / "set", EVERYTHING)
    change_rows(tmp_path / "set", name, change)
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path / "set")


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_a_sentence_that_the_list_of_episodes_contradicts_is_refused_with_both(version: str, tmp_path: Path):
    card = write(tmp_path / "set", EVERYTHING, version)
    path = tmp_path / "set" / "meta" / ("tasks.parquet" if version == "v3.0" else "tasks.jsonl")
    sentence = EVERYTHING[0].instruction
    if version == "v3.0":
        table = pq.read_table(path)
        texts = ["open the window" if text == sentence else text for text in table["task"].to_pylist()]
        pq.write_table(table.set_column(1, "task", pa.array(texts)), path)
    else:
        path.write_text(path.read_text().replace(json.dumps(sentence), '"open the window"'))
    with pytest.raises(DataError) as error:
        open_dataset(card)
    for word in ("episode 0", "'open the window'", repr(sentence), "meta/episodes"):
        assert word in str(error.value)
    own = replace(card.instruction, source="card", text="turn it")
    assert open_dataset(replace(card, instruction=own)).episodes[0].instruction == "turn it"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused_naming_episode_step_and_dimension(
    value: float, tmp_path: Path
):
    write(tmp_path / "set", EVERYTHING)
    change_rows(tmp_path / "set", "action", put(2, [0.0, 0.0, value, 0.0]))
    store = open_dataset(tmp_path / "set")
    with pytest.raises(DataError, match="episode 0: action .*(nan|inf).*step 2, dimension 2"):
        store.actions(0)


def test_rows_of_another_width_are_refused(tmp_path: Path):
    write(tmp_path / "set", EVERYTHING)
    change_rows(tmp_path / "set", "action", put(2, [0.0, 0.0]))
    with pytest.raises(DataError, match=r"action: .*\[2, 4\].*info\.json.* 4"):
        open_dataset(tmp_path / "set").actions(0)


def test_an_image_that_is_damaged_grey_or_of_another_size_is_refused_naming_the_step(tmp_path: Path):
    import io

    from PIL import Image

    def encoded(mode: str, size: tuple[int, int]) -> bytes:
        buffer = io.BytesIO()
        Image.new(mode, size).save(buffer, format="PNG")
        return buffer.getvalue()

    cases = [
        (b"rubbish", "damaged"),
        (encoded("L", (5, 6)), "a L image"),
        (encoded("RGB", (9, 9)), "the card says"),
    ]
    for number, (data, message) in enumerate(cases):
        folder = tmp_path / str(number)
        write(folder, EVERYTHING)
        change_rows(folder, "observation.images.front", put(2, {"bytes": data, "path": "x"}))
        store = open_dataset(folder)
        with pytest.raises(DataError, match=f"episode 0, step 2.*{message}"):
            store.image(0, 2, "front")
        store.image(0, 1, "front")


# ------------------------------------------------------------------------------------------- cost and workers


def test_an_action_chunk_decodes_no_image_of_another_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = open_dataset(write(tmp_path / "set", EVERYTHING))
    decoded: list[str] = []
    real = reader.decode_image
    monkeypatch.setattr(reader, "decode_image", lambda d, w: (decoded.append(w), real(d, w))[1])
    store.sample(0, 0, chunk=50)
    assert len(decoded) == 2  # one a camera


def test_open_videos_and_kept_images_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reader, "OPEN_VIDEOS", 2)
    store = on_video(tmp_path / "film", "v2.1", "libx264")
    for number in range(5):
        store.image(number, 0, "front")
        store.image(number, 0, "wrist")
    assert isinstance(store, reader.LeRobotStore)
    assert len(store._videos) == 2
    monkeypatch.setattr(reader, "IMAGE_BYTES", 500)
    images = open_dataset(write(tmp_path / "set", EVERYTHING))
    assert isinstance(images, reader.LeRobotStore)
    for number, demo in enumerate(EVERYTHING):
        for step in range(len(demo.actions)):
            images.image(number, step, "front")
    assert len(images._images._groups) <= 2


def test_a_store_that_read_from_videos_goes_to_a_spawned_worker(tmp_path: Path):
    from multiprocessing import get_context

    store = on_video(tmp_path / "set", "v3.0", "libx264")
    here = store.image(1, 2, "front").copy()
    with get_context("spawn").Pool(1) as pool:
        there = pool.apply(_read, (store,))
    np.testing.assert_array_equal(here, there)


def _read(store: EpisodeStore) -> np.ndarray:
    return store.image(1, 2, "front").copy()


def test_reading_a_lerobot_dataset_imports_neither_torch_nor_datasets():
    code = (
        "import sys\nfrom vlafit.datasets import open_dataset\n"
        f"open_dataset({str(FIXTURES / 'video_h264')!r}).image(0, 0, 'front')\n"
        "print([name for name in ('torch', 'datasets', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_random_corruption_of_a_table_ends_in_an_error_that_names_the_file_if_it_ends_in_one(tmp_path: Path):
    """Parquet has no checksum of its own: a flip of bits inside a number cannot be noticed."""
    write(tmp_path / "set", EVERYTHING)
    whole = (tmp_path / "set" / DATA).read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for number in range(60):
        rotten = bytearray(whole)
        if number % 2:
            place = int(rng.integers(4, len(whole) - 16))
            rotten[place : place + 8] = rng.bytes(8)
        else:
            rotten = rotten[: int(rng.integers(0, len(whole)))]
        (tmp_path / "set" / DATA).write_bytes(rotten)
        try:
            store = open_dataset(tmp_path / "set")
            for episode in range(4):
                store.state(episode), store.actions(episode), store.image(episode, 1, "front")
        except DataError as error:
            refused += 1
            assert "file-000" in str(error)
    assert refused >= 30  # all that were cut; a flip may hit pixels that PNG's checksum does not cover


def test_a_video_tells_the_time_of_every_frame_and_refuses_what_is_no_video(tmp_path: Path):
    on_video(tmp_path / "set", "v3.0", "libx264")
    film = next((tmp_path / "set" / "videos").rglob("file-000.mp4"))
    np.testing.assert_allclose(VideoFile(film).times(), np.arange(32) / FPS, atol=1e-6)
    with pytest.raises(DataError, match=r"note\.mp4.*video"):
        (tmp_path / "note.mp4").write_text("hello")
        VideoFile(tmp_path / "note.mp4")
    with pytest.raises(DataError, match="missing"):
        tables.require_file(tmp_path / "none.mp4")


@pytest.mark.case(
    section="data",
    report="frames from other files of the machine",
    user_has="a LeRobot dataset whose `data_path` or `video_path` is absolute or `../`, a stranger's",
    now="refused, naming info.json and the key",
)
@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@pytest.mark.parametrize(
    ("key", "template"),
    [
        ("data_path", "{away}/private.parquet"),
        ("data_path", "../away/private.parquet"),
        ("data_path", "{{nothing}}.parquet"),
        ("data_path", "{{chunk_index.__class__}}.parquet"),
        ("data_path", "{{chunk_index:999999999}}.parquet"),
        ("data_path", "{{chunk_index!r}}.parquet"),
        ("data_path", "{{0}}.parquet"),
        ("data_path", "{{"),
        ("video_path", "{{video_key}}/../../away/film.mp4"),
    ],
)
def test_a_template_of_paths_leads_nowhere_but_into_the_dataset(
    tmp_path: Path, version: str, key: str, template: str
):
    if key == "video_path":
        on_video(tmp_path / "set", version, CODECS[0])
    else:
        write(tmp_path / "set", demos(2), version)
    path = tmp_path / "set" / "meta" / "info.json"
    info = json.loads(path.read_text())
    if version == "v2.1":
        template = template.replace("chunk_index", "episode_index")
    (tmp_path / "away").mkdir()
    path.write_text(json.dumps(info | {key: template.format(away=tmp_path / "away")}))
    with pytest.raises(DataError) as caught:
        open_dataset(tmp_path / "set")
    assert str(tmp_path / "set" / "meta") in str(caught.value)


def test_a_chunk_size_of_nothing_is_named(tmp_path: Path):
    write(tmp_path / "set", demos(1), "v2.1")
    path = tmp_path / "set" / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chunks_size": 0}))
    with pytest.raises(DataError, match="chunks_size"):
        open_dataset(tmp_path / "set")


@pytest.mark.parametrize("name", ["{away}/private.png", "../away/private.png"])
def test_an_image_outside_the_dataset_is_refused(tmp_path: Path, name: str):
    write(tmp_path / "set", demos(1))
    (tmp_path / "away").mkdir()
    name = name.format(away=tmp_path / "away")
    file = next((tmp_path / "set" / "data").rglob("*.parquet"))
    table, key = pq.read_table(file), "observation.images.front"
    (tmp_path / "away" / "private.png").write_bytes(table[key][0].as_py()["bytes"])
    kind = table.schema.field(key).type
    column = pa.array([{"bytes": None, "path": name}] * len(table), kind)
    pq.write_table(table.set_column(table.column_names.index(key), key, column), file)
    store = open_dataset(tmp_path / "set")
    with pytest.raises(DataError) as caught:
        store.image(0, 0, store.embodiment.cameras[0].name)
    assert name in str(caught.value) and "step 0" in str(caught.value)


def test_many_files_are_not_read_again_until_one_of_them_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("VLAFIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "FEWEST", 3)
    read: list[Path] = []

    class Read(index.FileIndex):
        def __init__(self, path: Path, table: pa.Table) -> None:
            read.append(path)
            super().__init__(path, table)

    monkeypatch.setattr(index, "FileIndex", Read)
    everything = demos(3)
    jitter = np.random.default_rng(0).uniform(-0.2, 0.2, 20) / FPS
    stamps = lambda n: np.arange(n) / FPS + jitter[:n]  # noqa: E731
    card = write(tmp_path / "many", everything, "v2.1", stamps=stamps)
    card = replace(card, section=lerobot.Section(tolerance_s=1.0))

    def assert_right(store: EpisodeStore) -> None:
        assert len(store.episodes) == len(everything)
        for number, demo in enumerate(everything):
            assert store.episodes[number].instruction == demo.instruction
            np.testing.assert_array_equal(store.state(number), demo.state)
            assert (store.images(number, [1], "wrist")[0] == demo.wrist[1]).all()

    for times in (1, 1):
        store = open_dataset(card)
        assert_right(store)
        assert len(read) == times * len(everything)
        rows = store._rows[2]  # type: ignore[attr-defined]
        np.testing.assert_array_equal(rows.times_s, stamps(6).astype(np.float32))
    some = replace(card, section=lerobot.Section(episodes=(1, 2, 4), tolerance_s=1.0))
    assert [e.length for e in open_dataset(some).episodes] == [5, 6, 5]
    assert len(read) == len(everything) + 3

    read.clear()
    path = next((tmp_path / "many").glob("data/*/*000003.parquet"))
    table = pq.read_table(path)
    shorter = table.set_column(table.column_names.index("frame_index"), "frame_index", pa.array([0, 1, 2, 2]))
    pq.write_table(shorter, path)
    with pytest.raises(DataError, match="episode 3: frame_index does not count"):
        open_dataset(card)
    assert path in read

    pq.write_table(table, path)
    assert_right(open_dataset(card))
    for kept in (tmp_path / "cache").rglob("*.npz"):
        kept.write_bytes(kept.read_bytes()[:-40])
    assert_right(open_dataset(card))
    assert "the index is damaged" in caplog.text
