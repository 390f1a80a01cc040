"""Converting a dataset: what is read afterwards is what was read before, and nothing is half there."""

import json
import os
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.datasets import hdf5_writers, lerobot_files
from tests.datasets.layouts import demos, in_file_order
from tests.datasets.writers import libero
from vlafit import locks
from vlafit.cli import main
from vlafit.codec import Statistics
from vlafit.datasets import EpisodeStore, arrays_for_statistics, describe, open_dataset
from vlafit.datasets.convert import CARD, convert
from vlafit.datasets.convert.lerobot_stats import PixelCounts, of_rows
from vlafit.errors import DataError, StorageError, VlafitError

EVERYTHING = in_file_order(demos(2))
FIXTURES = Path("tests/fixtures/lerobot_datasets")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    """A layout with everything that a card can say: scales, mirrored and BGR cameras, words of its own."""
    folder = tmp_path_factory.mktemp("source") / "set"
    card = hdf5_writers.any_hdf5(folder, EVERYTHING)
    robot = replace(card.robot, action=replace(card.robot.action, unit="cm", labels=("x", "y", "z", "grip")))
    return open_dataset(replace(card, robot=robot))


def assert_same_samples(old: EpisodeStore, new: EpisodeStore) -> None:
    by = {(info.instruction, info.length): n for n, info in enumerate(new.episodes)}
    assert len(by) == len(old.episodes) == len(new.episodes)
    for number, info in enumerate(old.episodes):
        for step in range(info.length):
            one = old.sample(number, step, 3, history=2)
            other = new.sample(by[info.instruction, info.length], step, 3, history=2)
            assert one.observation.instruction == other.observation.instruction
            np.testing.assert_array_equal(one.actions, other.actions)
            np.testing.assert_array_equal(one.is_real, other.is_real)
            np.testing.assert_array_equal(one.observation.state, other.observation.state)
            for name, image in one.observation.images.items():
                np.testing.assert_array_equal(image, other.observation.images[name])


def statistics(store: EpisodeStore) -> list[dict[str, object]]:
    ids = sorted((e.instruction, e.length, e.id) for e in store.episodes)
    arrays = arrays_for_statistics(store, [i for _, _, i in ids], 1)
    return [Statistics.of(rows).to_json() for rows in arrays]


@pytest.mark.parametrize("to", ["lerobot", "libero"])
def test_samples_and_statistics_survive_both_ways_bit_for_bit(source: EpisodeStore, to: str, tmp_path: Path):
    there, back = tmp_path / "there", tmp_path / "back"
    assert convert(source, there, to) == ()
    once = open_dataset(there / CARD)
    assert_same_samples(source, once)
    convert(once, back, "libero" if to == "lerobot" else "lerobot")
    twice = open_dataset(back / CARD)
    assert_same_samples(source, twice)
    assert statistics(source) == statistics(once) == statistics(twice)
    assert once.embodiment == twice.embodiment == source.embodiment
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "there"]


def test_the_new_folder_needs_no_card_to_be_opened(source: EpisodeStore, tmp_path: Path):
    convert(source, tmp_path / "new", "lerobot")
    assert_same_samples(source, open_dataset(tmp_path / "new"))
    convert(source, tmp_path / "files", "libero")
    assert describe(tmp_path / "files").card.layout == "libero"


@pytest.mark.parametrize("kind", ["image", "video_h264"])
def test_what_lerobot_wrote_is_written_again_as_lerobot_wrote_it(kind: str, tmp_path: Path):
    old, new = FIXTURES / kind, tmp_path / "new"
    convert(open_dataset(old), new, "lerobot", video="h264" if kind != "image" else "")
    info = [json.loads((root / "meta/info.json").read_text()) for root in (old, new)]
    for one in info:
        for feature in one["features"].values():
            for key in ("video.preset", "video.fast_decode", "video.video_backend", "video.extra_options"):
                feature.get("info", {}).pop(key, None)  # of LeRobot's encoder
            feature.get("info", {}).pop("video.crf", None)  # the fixture's is not ours
    assert info[0] == info[1]
    names = ["data/chunk-000/file-000", "meta/tasks", "meta/episodes/chunk-000/file-000"]
    for name in names:
        one, other = (pq.read_table(root / f"{name}.parquet") for root in (old, new))
        assert one.schema.equals(other.schema), name
        assert _metadata(one) == _metadata(other)
        for column in one.column_names:
            if not column.startswith(("stats/", "observation.images")):
                assert one[column].to_pylist() == other[column].to_pylist(), column
    assert_stats_like_lerobots(old, new, lossless=kind == "image")


def assert_stats_like_lerobots(old: Path, new: Path, *, lossless: bool) -> None:
    """LeRobot estimates quantiles by histograms; of our true ones only their order is compared with it."""
    one, other = (json.loads((root / "meta/stats.json").read_text()) for root in (old, new))
    assert one.keys() == other.keys()
    for key, stats in one.items():
        assert list(stats) == list(other[key])
        assert stats["count"] == other[key]["count"]
        for name in ("min", "max", "mean"):
            near = 0.06 if "images" in key and not lossless else 1e-6  # video frames were encoded twice
            np.testing.assert_allclose(stats[name], other[key][name], atol=near, err_msg=f"{key} {name}")
            assert np.shape(stats[name]) == np.shape(other[key][name])


def _metadata(table) -> dict[bytes, object]:
    made = {key: json.loads(value) for key, value in (table.schema.metadata or {}).items()}
    made.get(b"huggingface", {}).pop("fingerprint", None)
    made.get(b"pandas", {}).get("creator", {}).pop("version", None)
    return made


def test_statistics_of_pixels_are_those_of_all_their_values():
    frames = np.random.default_rng(0).integers(3, 250, (5, 7, 6, 3), dtype=np.uint8)
    halves = PixelCounts(), PixelCounts()
    halves[0].add(frames[:2])
    halves[1].add(frames[2:])
    halves[0].merge(halves[1:])
    expected = of_rows(frames.reshape(-1, 3) / 255.0)
    for name, values in halves[0].stats().items():
        if name != "count":
            np.testing.assert_allclose(values[:, 0, 0], expected[name], atol=1e-12, err_msg=name)
    assert halves[0].stats()["count"].tolist() == [5]


@pytest.mark.parametrize("codec", ["h264", "av1"])
def test_videos_hold_every_frame_of_every_episode(codec: str, tmp_path: Path):
    old = open_dataset(FIXTURES / "image")
    lost = convert(old, tmp_path / "new", "lerobot", video=codec)
    assert lost == (f"pixels: {codec} is lossy",)
    new = open_dataset(tmp_path / "new" / CARD)
    for number, info in enumerate(old.episodes):
        steps = range(info.length)
        pairs = {c: [s.images(number, steps, c).astype(int) for s in (old, new)] for c in ("front", "wrist")}
        for one, other in pairs.values():
            assert np.abs(one - other).mean(axis=(1, 2, 3)).max() < 5
        one, other = pairs["wrist"]  # it moves by more than what the codec loses
        apart = np.abs(one[:, None] - other[None]).mean(axis=(2, 3, 4))  # [T, T]
        assert apart.argmin(axis=1).tolist() == list(steps)


# ------------------------------------------------------------------------------------------ nothing half done


class _Broken(EpisodeStore):
    """A store whose frames cannot be read from some episode on."""

    def __init__(self, store: EpisodeStore, last: int) -> None:
        self.card, self.episodes, self._store, self._last = store.card, store.episodes, store, last

    def state(self, episode: int):
        return self._store.state(episode)

    def actions(self, episode: int):
        return self._store.actions(episode)

    def image(self, episode: int, step: int, camera: str):
        if episode > self._last:
            raise DataError("file.h5: take-3 is damaged")
        return self._store.image(episode, step, camera)

    def files(self) -> tuple[Path, ...]:
        return self._store.files()


@pytest.mark.parametrize("to", ["lerobot", "libero"])
def test_a_conversion_that_fails_leaves_nothing_and_starts_anew(
    source: EpisodeStore, to: str, tmp_path: Path
):
    out = tmp_path / "new"
    with pytest.raises(DataError, match="take-3 is damaged"):
        convert(_Broken(source, 2), out, to)
    assert not list(tmp_path.iterdir())
    partial = tmp_path / ".new.partial"  # of a process that was killed
    partial.mkdir()
    (partial / "rest").write_text("half")
    convert(source, out, to)
    assert not (out / "rest").exists() and not partial.exists()
    assert_same_samples(source, open_dataset(out / CARD))


def test_a_full_disk_is_one_sentence_and_leaves_nothing(source: EpisodeStore, tmp_path: Path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"\.hdf5.*free space"):
            convert(source, tmp_path / "new", "libero")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_another_process_converts_to_is_left_alone(source: EpisodeStore, tmp_path: Path):
    out = tmp_path / "new"
    for _ in range(2):  # the first refusal must not take the lock away
        with (
            locks.creating(out, "vlafit data convert"),
            pytest.raises(VlafitError, match=f"{out}.*process {os.getpid()}"),
        ):
            convert(source, out, "libero")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_or_belongs_to_the_dataset_is_refused(source: EpisodeStore, tmp_path: Path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "note.txt").write_text("mine")
    with pytest.raises(DataError, match="there: already exists"):
        convert(source, tmp_path / "there", "lerobot")
    own = source.files()[0].parent
    for inside in (own / "new", own):
        with pytest.raises(DataError, match="already exists|never changed in place"):
            convert(source, inside, "lerobot")
    assert (tmp_path / "there" / "note.txt").read_text() == "mine"
    one_file = open_dataset(replace(source.card, path=str(source.files()[0])))
    convert(one_file, own / "new", "libero")
    shutil.rmtree(own / "new")


def test_what_the_target_cannot_hold_is_refused_by_name(source: EpisodeStore, tmp_path: Path):
    card = source.card
    slow = open_dataset(replace(card, robot=replace(card.robot, hz=12.5)))
    with pytest.raises(DataError, match=r"12\.5 Hz.*whole number"):
        convert(slow, tmp_path / "new", "lerobot")
    convert(slow, tmp_path / "files", "libero")
    assert open_dataset(tmp_path / "files" / CARD).embodiment.hz == 12.5
    with pytest.raises(DataError, match=r"camera 'front': frames are 6x5.*even"):
        convert(source, tmp_path / "new", "lerobot", video="h264")
    named = replace(card.robot.cameras[0], name="arm/front")
    other = open_dataset(replace(card, robot=replace(card.robot, cameras=(named,))))
    with pytest.raises(DataError, match="'arm/front' holds a slash"):
        convert(other, tmp_path / "new", "libero")
    for to, video, message in (
        ("lerobt", "", "did you mean 'lerobot'"),
        ("libero", "h264", "without loss"),
        ("lerobot", "h265", "did you mean 'h264'"),
    ):
        with pytest.raises(DataError, match=message):
            convert(source, tmp_path / "new", to, video=video)


def test_what_is_read_back_otherwise_is_an_error(
    source: EpisodeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from vlafit.datasets.convert import lerobot

    real = lerobot.png
    monkeypatch.setattr(lerobot, "png", lambda frame: real(frame ^ 1))
    with pytest.raises(DataError, match="read back other than"):
        convert(source, tmp_path / "new", "lerobot")
    assert not (tmp_path / "new").exists()


def test_seeds_and_tasks_that_are_lost_are_told(tmp_path: Path):
    card = hdf5_writers.maniskill(tmp_path / "set", EVERYTHING)
    lost = convert(open_dataset(card), tmp_path / "new", "lerobot")
    assert len(lost) == 1 and "seeds" in lost[0]
    convert(open_dataset(card), tmp_path / "files", "libero")
    seeds = {info.seed for info in open_dataset(tmp_path / "files" / CARD).episodes}
    assert seeds == {100, 101}


def test_a_file_a_task_and_sentence_with_names_that_differ(tmp_path: Path):
    everything = [replace(d, task=f"pick {'A' if n % 2 else 'a'}?!") for n, d in enumerate(demos(4)[:4])]
    old = open_dataset(lerobot_files.write(tmp_path / "set", everything))
    convert(old, tmp_path / "new", "libero")
    files = sorted(p.name for p in (tmp_path / "new").glob("*.hdf5"))
    assert files == ["pick_A_2_demo.hdf5", "pick_a_demo.hdf5"]
    with h5py.File(tmp_path / "new" / files[0]) as file:
        assert file["data/demo_0"].attrs["source_episode"] == "episode_000001"
    assert_same_samples(old, open_dataset(tmp_path / "new" / CARD))


def test_the_verb_converts_and_says_what_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    libero(tmp_path / "files", EVERYTHING[:2])
    assert main(["data", "convert", str(tmp_path / "files"), "--to", "lerobot", str(tmp_path / "new")]) == 0
    assert "2 episodes, read back" in capsys.readouterr().out
    assert main(["data", "inspect", str(tmp_path / "new" / CARD)]) == 0
    assert main(["data", "convert", str(tmp_path / "files"), "--to", "lerobot", str(tmp_path / "new")]) == 2
    assert "already exists" in capsys.readouterr().err
