"""LeRobot datasets of a web server, read in place: what is copied, how much is kept, and what goes wrong."""

import logging
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.datasets import corruptions, lerobot_files
from tests.datasets.layouts import demos
from tests.datasets.lerobot_files import key_of
from tests.datasets.test_remote import assert_same
from tests.datasets.web_server import Server, contents, serving
from vlafit import cli
from vlafit.datasets import ChunkDataset, SampleOrder, downloads, load_card, open_dataset, remote, web_files
from vlafit.datasets.bounded_cache import SIZE_SWITCH, BoundedCache, chosen_limit
from vlafit.datasets.layouts import lerobot
from vlafit.datasets.lerobot import meta
from vlafit.errors import ConfigError, DataError
from vlafit.train.prefetch import Prefetcher, warn_of_repeated_copies

ROWS = [f"data/chunk-000/file-{n:03d}.parquet" for n in range(3)]
FRONT, WRIST = (
    [f"videos/{key_of(camera)}/chunk-000/file-{n:03d}.mp4" for n in range(3)] for camera in ("front", "wrist")
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten episodes in three files of rows, and as many videos of each camera."""
    folder = tmp_path_factory.mktemp("arm") / "arm"
    corruptions.video(folder, demos(5))
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLAFIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(downloads, "WAITS_S", (0.0, 0.0, 0.0))
    return tmp_path / "cache" / "in_place"


@pytest.fixture
def server(folder: Path, cache: Path) -> Iterator[Server]:
    with serving({f"arm/{name}": content for name, content in contents(folder).items()}) as server:
        yield server


def url(server: Server) -> str:
    return f"{server.address}/arm"


def read(server: Server) -> list[str]:
    return [name.removeprefix("arm/") for name in server.names()]


def kept(cache: Path) -> set[str]:
    """The files of the cache that are not metadata, by their names in the dataset."""
    paths = [path for path in cache.glob("*/arm/**/*") if path.is_file() and "meta" not in path.parts]
    return {path.as_posix().partition("/arm/")[2] for path in paths if not path.name.startswith(".")}


def test_a_dataset_of_a_web_server_reads_as_its_folder(server: Server, folder: Path, cache: Path):
    store = open_dataset(url(server))
    assert store.card.source == url(server) and store.card.name == "arm"
    assert_same(store, open_dataset(folder))
    assert kept(cache) == {*ROWS, *FRONT, *WRIST}


def test_only_the_files_that_a_window_needs_are_copied_and_each_once(server: Server, cache: Path):
    store = open_dataset(url(server))
    assert kept(cache) == set(ROWS)  # states and actions, by which episodes are checked
    sample = store.sample(5, 1, 4)
    assert kept(cache) == {*ROWS, FRONT[1], WRIST[1]}
    before = len(server.read)
    again = store.sample(5, 1, 4)
    assert len(server.read) == before
    np.testing.assert_array_equal(sample.actions, again.actions)
    others = [name for name in read(server) if name != "meta/info.json"]  # it says which others there are
    assert len(set(others)) == len(others)


def listings(server: Server) -> int:
    return read(server).count("meta/info.json")  # which says what others there are


@pytest.mark.parametrize("verb", ["inspect", "stats"])
def test_a_dataset_is_listed_once_by_each_command_and_anew_by_the_next(
    server: Server, verb: str, capsys: pytest.CaptureFixture[str]
):
    open_dataset(url(server))
    assert listings(server) == 2  # to list, and to copy it
    for times in (3, 4):
        assert cli.main(["data", verb, url(server)]) == 0
        assert listings(server) == times


def test_what_was_looked_at_long_ago_is_listed_anew(server: Server, monkeypatch: pytest.MonkeyPatch):
    card = load_card(url(server))
    monkeypatch.setattr(remote, "LISTING_HOLDS_S", 0.0)
    open_dataset(card)
    assert listings(server) == 3


def test_a_second_opening_reads_no_file(server: Server, folder: Path):
    open_dataset(url(server))
    before = len(server.names())
    assert open_dataset(url(server)).episodes == open_dataset(folder).episodes
    assert set(read(server)[before:]) <= {"meta/info.json"}  # it says which others there are


def test_a_card_at_a_url_reads_its_episodes_and_cameras(server: Server, folder: Path, cache: Path):
    whole = load_card(folder)
    robot = replace(whole.robot, cameras=(whole.robot.cameras[1],))
    card = replace(
        whole,
        path=url(server),
        robot=robot,
        section=lerobot.Section(episodes=(1, 5)),
        expect=type(whole.expect)(),
    )
    assert_same(open_dataset(card), open_dataset(replace(card, path=str(folder))))
    assert kept(cache) == {*ROWS[:2], *WRIST[:2]}


def test_images_of_a_table_are_copied_when_one_is_read_and_its_columns_before(tmp_path: Path, cache: Path):
    local = tmp_path / "arm"
    lerobot_files.write(local, demos(5))
    with serving({f"arm/{name}": content for name, content in contents(local).items()}) as server:
        store = open_dataset(url(server))
        for episode in range(len(store.episodes)):
            np.testing.assert_array_equal(store.state(episode), open_dataset(local).state(episode))
        assert kept(cache) == set()
        store.image(5, 0, "front")
        assert kept(cache) == {ROWS[1]}
        assert_same(store, open_dataset(local))


def test_a_server_that_sends_whole_files_is_read_too(tmp_path: Path, cache: Path):
    local = tmp_path / "arm"
    lerobot_files.write(local, demos(2), "v2.1")
    with serving({f"arm/{name}": content for name, content in contents(local).items()}) as server:
        server.ranges = False
        assert_same(open_dataset(url(server)), open_dataset(local))


def test_the_cache_is_bounded_and_what_was_not_used_longest_goes_first(
    server: Server,
    folder: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    sizes = {name: len(server.files[f"arm/{name}"]) for name in (*ROWS, *FRONT, *WRIST)}
    meta = sum(len(c) for name, c in server.files.items() if "/meta/" in name)
    limit = sum(sizes[name] for name in ROWS) + sizes[FRONT[0]] + sizes[WRIST[0]] + 100
    monkeypatch.setenv(SIZE_SWITCH, str(limit))
    with caplog.at_level(logging.INFO):
        store = open_dataset(url(server))
    assert f"is read in place, 9 files of {downloads.as_text(sum(sizes.values()))}" in caplog.text
    assert f"at most {downloads.as_text(limit)} are kept at {cache} ({SIZE_SWITCH})" in caplog.text
    other = open_dataset(folder)
    for step in range(3):  # over and over, so that files are deleted and copied again
        for episode in range(10):
            for camera in ("front", "wrist"):
                np.testing.assert_array_equal(
                    store.image(episode, step, camera), other.image(episode, step, camera)
                )
            assert sum(path.stat().st_size for path in cache.rglob("*") if is_counted(path)) <= limit
    assert {FRONT[2], WRIST[2]} <= kept(cache) and ROWS[0] not in kept(cache)
    assert len(read(server)) > 9 and meta


def is_counted(path: Path) -> bool:
    return path.is_file() and "meta" not in path.parts and not path.name.startswith(".")


def test_deleted_files_are_closed_so_that_the_disk_is_free(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    sizes = {name: len(server.files[f"arm/{name}"]) for name in (*ROWS, *FRONT, *WRIST)}
    limit = max(sizes[a] + sizes[b] + sizes[c] for a, b, c in zip(ROWS, FRONT, WRIST, strict=True))
    monkeypatch.setenv(SIZE_SWITCH, str(limit))
    store = open_dataset(url(server))
    for episode in (0, 5, 9, 0):
        store.sample(episode, 0, 2)
    links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if exists(fd)]
    assert not [link for link in links if link.startswith(str(cache)) and link.endswith("(deleted)")]


def exists(fd: str) -> bool:
    return Path(f"/proc/self/fd/{fd}").is_symlink()


def test_a_cache_that_is_too_small_for_one_episode_is_refused(
    server: Server, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(SIZE_SWITCH, "2kB")
    with pytest.raises(
        DataError, match=r"one episode is in files of .*more than the 2.0 kB.*VLAFIT_CACHE_SIZE"
    ):
        open_dataset(url(server))


@pytest.mark.parametrize(("text", "size"), [("50GB", 50e9), ("1.5 mb", 1.5e6), ("800", 800), ("2T", 2e12)])
def test_the_size_of_the_cache_is_chosen(
    text: str, size: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(SIZE_SWITCH, text)
    assert chosen_limit(tmp_path, 0) == size


@pytest.mark.parametrize("text", ["much", "-1GB", "0", "5 PB"])
def test_a_size_that_is_none_is_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(SIZE_SWITCH, text)
    with pytest.raises(ConfigError, match=rf"VLAFIT_CACHE_SIZE is {re.escape(repr(text))}"):
        chosen_limit(tmp_path, 0)


@pytest.mark.parametrize("fault", ["drop", "503"])
@pytest.mark.parametrize("name", [ROWS[1], FRONT[0], "meta/tasks.parquet"])
def test_a_dropped_connection_is_tried_again(server: Server, folder: Path, name: str, fault: str):
    server.faults[f"arm/{name}"] = [fault] * 3
    store = open_dataset(url(server))
    np.testing.assert_array_equal(store.image(0, 0, "front"), open_dataset(folder).image(0, 0, "front"))
    assert read(server).count(name) == 4


@pytest.mark.parametrize("fault", ["drop", "503"])
@pytest.mark.parametrize("images", [False, True])
def test_a_server_that_fails_at_the_first_request_for_anything_is_read_to_the_end(
    folder: Path, tmp_path: Path, cache: Path, fault: str, images: bool
):
    local = folder
    if images:  # in tables, of which ranges are read
        local = tmp_path / "arm"
        lerobot_files.write(local, demos(5))
    with serving({f"arm/{name}": content for name, content in contents(local).items()}) as server:
        server.first = fault
        assert_same(open_dataset(url(server)), open_dataset(local))


@pytest.mark.parametrize(("fault", "reason"), [("drop", "IncompleteRead"), ("503", "503")])
def test_metadata_that_stays_away_is_named(server: Server, fault: str, reason: str):
    server.faults["arm/meta/info.json"] = [fault] * 4
    with pytest.raises(DataError, match=f"arm/meta/info.json: could not be read in 4 attempts: .*{reason}"):
        open_dataset(url(server))


@pytest.mark.parametrize(
    ("fault", "reason"), [("drop", "ConnectionError: the connection ended"), ("503", "503")]
)
def test_a_connection_that_stays_away_is_named_and_leaves_nothing(
    server: Server, cache: Path, fault: str, reason: str
):
    store = open_dataset(url(server))
    server.faults[f"arm/{FRONT[1]}"] = [fault] * 4
    with pytest.raises(DataError, match=f"{FRONT[1]}: could not be read in 4 attempts: .*{reason}.*--resume"):
        store.image(5, 0, "front")
    assert kept(cache) == set(ROWS) and not list(cache.rglob("*.partial"))
    store.image(5, 0, "front")  # once it is back


def test_a_server_that_does_not_answer_in_time_is_tried_again(
    server: Server, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(web_files, "TIMEOUT_S", 0.3)
    store = open_dataset(url(server))
    server.faults[f"arm/{FRONT[0]}"] = ["hang"]
    store.image(0, 0, "front")
    assert read(server).count(FRONT[0]) == 2


def test_ranges_that_drop_are_tried_again_and_then_named(tmp_path: Path, cache: Path):
    local = tmp_path / "arm"
    lerobot_files.write(local, demos(2))
    with serving({f"arm/{name}": content for name, content in contents(local).items()}) as server:
        server.faults[f"arm/{ROWS[0]}"] = ["drop"] * 2
        open_dataset(url(server))
        (next(cache.parent.glob("datasets/*.npz"))).unlink()
        server.faults[f"arm/{ROWS[0]}"] = ["drop"] * 4
        with pytest.raises(DataError, match=f"{ROWS[0]}: could not be read in 4 attempts"):
            open_dataset(url(server))


def test_a_file_that_is_forbidden_or_gone_is_named_at_once(server: Server):
    store = open_dataset(url(server))
    server.faults[f"arm/{FRONT[0]}"] = ["forbidden"]
    with pytest.raises(DataError, match=f"{FRONT[0]}: cannot be read: PermissionError.*403"):
        store.image(0, 0, "front")
    del server.files[f"arm/{WRIST[0]}"]
    with pytest.raises(DataError, match=f"{WRIST[0]}: cannot be read: FileNotFoundError.*404"):
        store.image(0, 0, "wrist")


def test_a_file_that_is_not_there_is_named_with_its_episode_when_the_dataset_is_opened(server: Server):
    del server.files[f"arm/{ROWS[1]}"]
    with pytest.raises(DataError, match=rf"{ROWS[1]} is missing.*episode 4"):
        open_dataset(url(server))


def test_a_file_that_was_written_since_is_refused(server: Server, cache: Path):
    store = open_dataset(url(server))
    server.files[f"arm/{FRONT[0]}"] = server.files[f"arm/{FRONT[1]}"]
    with pytest.raises(DataError, match=f"{FRONT[0]}: changed since the dataset was opened"):
        store.image(0, 0, "front")
    assert FRONT[0] not in kept(cache)


def test_a_copy_of_another_version_is_never_read(server: Server, folder: Path, tmp_path: Path):
    open_dataset(url(server)).image(0, 0, "front")
    other = tmp_path / "other"
    flipped = [replace(demo, front=255 - demo.front) for demo in demos(5)]
    corruptions.video(other, flipped)
    server.files[f"arm/{FRONT[0]}"] = (other / FRONT[0]).read_bytes()  # nothing else, not even metadata
    np.testing.assert_array_equal(
        open_dataset(url(server)).image(0, 0, "front"), open_dataset(other).image(0, 0, "front")
    )


def test_without_the_server_what_is_kept_is_read_and_what_is_not_is_named(
    folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
):
    with serving({f"arm/{name}": content for name, content in contents(folder).items()}) as server:
        open_dataset(url(server)).image(0, 0, "front")
    store = open_dataset(url(server))
    assert "cannot be read" in caplog.text or "reading on from the copies" in caplog.text
    np.testing.assert_array_equal(store.image(0, 0, "front"), open_dataset(folder).image(0, 0, "front"))
    with pytest.raises(DataError, match=f"{WRIST[0]}: could not be read.*refused"):
        store.image(0, 0, "wrist")


@pytest.mark.parametrize("name", ["", "arm/meta/info.json"])
def test_an_address_without_a_lerobot_dataset_is_refused_with_a_way_to_get_the_files(
    server: Server, name: str
):
    with pytest.raises(DataError, match="has no meta/info.json.*wget --recursive"):
        open_dataset(f"{server.address}/{name or 'nothing'}")


def test_the_verbs_take_the_address(server: Server, cache: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["data", "inspect", url(server)]) == 0
    assert "10 episodes" in capsys.readouterr().out and kept(cache) == set(ROWS)
    assert cli.main(["data", "card", url(server)]) == 0
    assert f'path = "{url(server)}"' in capsys.readouterr().out
    assert cli.main(["data", "check", url(server), "--no-pixels"]) in (0, 1)


def test_a_store_is_pickled_and_another_process_reads_on(server: Server, folder: Path):
    store = pickle.loads(pickle.dumps(open_dataset(url(server))))  # noqa: S301
    np.testing.assert_array_equal(store.image(5, 0, "wrist"), open_dataset(folder).image(5, 0, "wrist"))


def test_what_a_killed_process_left_is_deleted_and_files_in_flight_count(tmp_path: Path):
    cache = BoundedCache(tmp_path, 100)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / ".old.60.partial").write_bytes(b"x" * 10)

    def copy(target: Path) -> None:
        assert cache.used() == 70
        target.write_bytes(b"y" * 70)

    assert cache.get(tmp_path / "set" / "new", (70, 10**9), copy)
    assert not list(tmp_path.rglob("*.partial")) and cache.used() == 70
    assert not cache.get(tmp_path / "set" / "new", (70, 10**9), copy)


def test_files_are_copied_ahead_in_the_order_of_training_and_no_further_than_half_the_cache(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    sizes = {name: len(server.files[f"arm/{name}"]) for name in (*ROWS, *FRONT, *WRIST)}
    limit = 2 * (sizes[ROWS[2]] + sizes[FRONT[2]] + sizes[WRIST[2]] + sizes[FRONT[0]] + 10)
    monkeypatch.setenv(SIZE_SWITCH, str(max(limit, 1)))
    store = open_dataset(url(server))
    chunks = ChunkDataset([store], 2, [[store.episodes[n].id for n in (9, 1)]])
    with Prefetcher(chunks, lambda step: [step]) as ahead:
        root = Path(store.card.path)
        coming = [path.relative_to(root).as_posix() for _, path in ahead.coming(0, len(chunks))]
        assert coming[:3] == [FRONT[2], WRIST[2], ROWS[2]] and set(coming[3:]) <= {
            FRONT[0],
            WRIST[0],
            ROWS[0],
        }
        assert coming[3:4] == [FRONT[0]] and ROWS[0] not in coming
        before = len(read(server))
        ahead.go_on(0, len(chunks))
        while not {*coming} <= kept(cache):
            pass
    assert set(read(server)[before:]) <= set(coming)
    before = len(server.names())
    for position in range(store.episodes[9].length):
        _ = chunks[position]
    assert len(server.names()) == before  # all of it was there


def test_samples_of_few_files_are_mixed_at_a_time(server: Server):
    store = open_dataset(url(server))
    chunks = ChunkDataset([store], 2, [[info.id for info in store.episodes]])
    files = chunks.files()
    assert len(set(files)) == 3
    order = SampleOrder(len(chunks), 3, files=files, mixed=2)
    epochs = [[order.sample(k)[1] for k in range(e * len(chunks), (e + 1) * len(chunks))] for e in (0, 1)]
    firsts = []
    for epoch in epochs:
        assert sorted(epoch) == list(range(len(chunks)))
        numbers = files[epoch]
        changes = {tuple(sorted(set(numbers[:cut]) & set(numbers[cut:]))) for cut in range(1, len(numbers))}
        assert () in changes  # two files come first, and the third when they are done
        firsts.append(tuple(sorted(set(numbers[:5]))))
    assert epochs[0] != epochs[1]
    assert [SampleOrder(9, 1).sample(k) for k in range(9)] == [
        SampleOrder(9, 1, files=np.zeros(9, np.int64), mixed=0).sample(k) for k in range(9)
    ]


def test_a_dataset_larger_than_the_cache_in_random_order_is_warned_of(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    sizes = {name: len(server.files[f"arm/{name}"]) for name in (*ROWS, *FRONT, *WRIST)}
    monkeypatch.setenv(SIZE_SWITCH, str(sum(sizes.values()) - 1))
    store = open_dataset(url(server))
    chunks = ChunkDataset([store], 2, [[info.id for info in store.episodes]])
    warn_of_repeated_copies(chunks, 0)
    assert "samples are in random order" in caplog.text and "Set data.mixed_files = 1" in caplog.text
    caplog.clear()
    warn_of_repeated_copies(chunks, 1)
    assert not caplog.text


def test_a_bucket_is_read_in_place_by_the_client_of_its_storage(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("s3fs")
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "a"),
        ("AWS_SECRET_ACCESS_KEY", "b"),
        ("AWS_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    with serving({f"arm/{name}": content for name, content in contents(folder).items()}) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.address)
        store = open_dataset("s3://bucket/arm")
        assert kept(cache) == set(ROWS)
        server.faults[f"arm/{FRONT[0]}"] = ["drop", "503"]
        assert_same(store, open_dataset(folder))
        before = len(server.names())
        other = open_dataset("s3://bucket/arm")
        assert_same(other, store)
        assert len(server.names()) == before
        server.faults[f"arm/{WRIST[1]}"] = ["drop"] * 100  # the client tries again by itself, too
        (Path(store.card.path) / WRIST[1]).unlink()
        other.close()
        with pytest.raises(DataError, match=f"bucket/arm/{WRIST[1]}: could not be read in 4 attempts"):
            other.image(5, 0, "wrist")
        server.faults.clear()
        server.files[f"arm/{WRIST[1]}"] = server.files[f"arm/{WRIST[0]}"]
        with pytest.raises(DataError, match=f"{WRIST[1]}: changed since the dataset was opened"):
            other.image(5, 0, "wrist")


def flipped(path: Path, at: float) -> None:
    """Spoil some bytes of a copy, whose size and time stay as they were."""
    before, content = path.stat(), bytearray(path.read_bytes())
    place = int(at * len(content)) if at >= 0 else len(content) - 1
    content[place : place + 24] = bytes(byte ^ 0xFF for byte in content[place : place + 24])
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    ("name", "at"),
    [("meta/tasks.parquet", -1), ("meta/info.json", 0.0), (ROWS[1], -1), (FRONT[2], 0.0)],
)
def test_a_copy_that_cannot_be_read_is_copied_again_once(
    name: str, at: float, server: Server, folder: Path, cache: Path
):
    store = open_dataset(url(server))
    for number in range(len(store.episodes)):
        store.sample(number, 0, 4)
    store.close()
    (path,) = cache.glob(f"*/arm/{name}")
    flipped(path, at)
    meta._read.cache_clear()  # as in another process
    shutil.rmtree(cache.parent / "datasets", ignore_errors=True)  # the index, with which no row is read
    assert_same(open_dataset(url(server)), open_dataset(folder))
    assert path.read_bytes() == (folder / name).read_bytes()


def test_what_is_damaged_at_its_source_names_the_copy_and_how_to_remove_it(server: Server, cache: Path):
    for name in ("meta/tasks.parquet", ROWS[0]):
        good = server.files[f"arm/{name}"]
        server.files[f"arm/{name}"] = good[:-1] + b"?"
        with pytest.raises(DataError) as caught:
            store = open_dataset(url(server))
            store.sample(0, 0, 4)
        message = str(caught.value)
        assert f"a copy of {url(server)}/{name.split('/')[0]}" in message and "delete the copy" in message
        assert f"{cache}" in message and read(server).count(name) >= 2
        server.files[f"arm/{name}"] = good
        open_dataset(url(server)).sample(0, 0, 4)  # the source is whole again
