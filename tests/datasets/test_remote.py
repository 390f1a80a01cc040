"""Datasets on object storage: read as their folder is, copied whole and once, refused by name."""

import base64
import hashlib
import logging
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.datasets import corruptions
from tests.datasets.layouts import card as libero_card
from tests.datasets.layouts import demos, write_libero
from tests.datasets.lerobot_files import key_of
from vlafit import cli
from vlafit.datasets import EpisodeStore, downloads, load_card, open_dataset, remote, storage
from vlafit.datasets.layouts import lerobot
from vlafit.errors import ConfigError, DataError

URL = "memory://bucket/sets/arm"


class Bucket(MemoryFileSystem):
    """Files in memory, of its own, that counts what is read and can fail in the ways of a network."""

    cachable = False
    protocol = "memory"

    def __init__(self, folder: Path, at: str = "/bucket/sets/arm") -> None:
        super().__init__()
        self.store: dict[str, Any] = {}
        self.read: list[str] = []
        self.faults: dict[str, list[str]] = {}
        """Name -> what happens when it is read: "drop", "cut", "flip" or "gone", one a time."""
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            self.pipe(f"{at}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def get_file(self, rpath: str, lpath: str, **_: object) -> None:
        name = rpath.removeprefix("/bucket/sets/arm/")
        self.read.append(name)
        fault = self.faults[name].pop(0) if self.faults.get(name) else ""
        content = self.cat_file(rpath)
        if fault == "gone":
            raise FileNotFoundError(rpath)
        Path(lpath).write_bytes(content[:-3] if fault in ("cut", "drop") else content)
        if fault == "flip":
            Path(lpath).write_bytes(bytes([content[0] ^ 1]) + content[1:])
        if fault == "drop":
            raise ConnectionResetError("reset by peer")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten episodes in three files of rows, and as many videos of each camera."""
    folder = tmp_path_factory.mktemp("arm") / "arm"
    corruptions.video(folder, demos(5))
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLAFIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "remote"


@pytest.fixture
def bucket(folder: Path) -> Bucket:
    return Bucket(folder)


@pytest.fixture
def published(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryFileSystem]:
    """The same files where `memory://` finds them, as s3:// would with its package."""
    monkeypatch.setitem(remote.STORAGE, "memory", "fsspec.implementations.memory")
    system = MemoryFileSystem()
    system.put(str(folder), "/bucket/sets/", recursive=True)
    yield system
    system.rm("/bucket", recursive=True)


def no_pause(seconds: float) -> None:
    """A test does not wait."""


def names(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def assert_same(store: EpisodeStore, other: EpisodeStore) -> None:
    assert store.episodes == other.episodes
    for n, info in enumerate(store.episodes):
        np.testing.assert_array_equal(store.state(n), other.state(n))
        np.testing.assert_array_equal(store.actions(n), other.actions(n))
        for camera in store.embodiment.cameras:
            ours, theirs = (s.images(n, range(info.length), camera.name) for s in (store, other))
            np.testing.assert_array_equal(ours, theirs)


def test_a_dataset_at_a_url_reads_as_its_folder_and_is_called_so(published: MemoryFileSystem, folder: Path):
    store = open_dataset(URL)
    assert_same(store, open_dataset(folder))
    assert store.card.name == "arm" and store.card.source == URL


def test_a_recipe_and_the_verbs_take_a_url(published: MemoryFileSystem, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["data", "inspect", URL]) == 0
    output = capsys.readouterr()
    assert "10 episodes" in output.out and "arm: layout lerobot" in output.out
    assert f"{URL}: is read in place, 9 files" in output.err and "warning" not in output.err
    assert cli.main(["data", "card", URL]) == 0
    assert f'path = "{URL}"' in capsys.readouterr().out


def test_a_card_at_a_url_copies_only_the_episodes_and_cameras_that_it_reads(
    folder: Path, published: MemoryFileSystem
):
    whole = load_card(folder)
    robot = replace(whole.robot, cameras=(whole.robot.cameras[1],))
    card = replace(
        whole, path=URL, robot=robot, section=lerobot.Section(episodes=(1, 5)), expect=type(whole.expect)()
    )
    store = open_dataset(card)
    assert_same(store, open_dataset(replace(card, path=str(folder))))
    root = Path(store.card.path)
    wrist = key_of("wrist")
    data = {f"data/chunk-000/file-{n:03d}.parquet" for n in (0, 1)}
    videos = {f"videos/{wrist}/chunk-000/file-{n:03d}.mp4" for n in (0, 1)}
    assert names(root) == {n for n in names(folder) if n.startswith("meta/")} | data | videos


def test_files_of_an_earlier_copy_are_not_copied_again(bucket: Bucket):
    def of_meta(folder: Path, listed: Collection[str]) -> Collection[str]:
        return [name for name in listed if name.startswith("meta/")]

    storage.fetch(bucket, URL, downloads.Needed("meta/", of_meta))
    before = len(bucket.read)
    storage.fetch(bucket, URL)
    assert {name.split("/")[0] for name in bucket.read[before:]} == {"data", "videos"}


def test_hdf5_files_at_a_url_are_found_by_their_pattern(published: MemoryFileSystem, tmp_path: Path):
    everything = demos(2)
    local = write_libero(tmp_path / "local", everything)
    published.put(str(tmp_path / "local"), "/bucket/h5", recursive=True)
    card = replace(libero_card(local), path="memory://bucket/h5/*.hdf5")
    assert_same(open_dataset(card), open_dataset(libero_card(local)))


def test_a_second_opening_copies_nothing_and_a_later_one_only_what_was_written_since(bucket: Bucket):
    first = storage.fetch(bucket, URL)
    assert len(bucket.read) == 13
    assert storage.fetch(bucket, URL) == first and len(bucket.read) == 13
    info = bucket.cat_file("/bucket/sets/arm/meta/info.json")
    bucket.pipe("/bucket/sets/arm/meta/info.json", info.replace(b"}", b" }", 1))
    second = storage.fetch(bucket, URL)
    assert bucket.read[13:] == ["meta/info.json"]
    assert second != first and second.name == first.name == "arm"
    assert (first / "meta/info.json").read_bytes() == info != (second / "meta/info.json").read_bytes()


@pytest.mark.parametrize("fault", ["drop", "cut"])
def test_a_connection_that_drops_is_tried_again_and_then_named(bucket: Bucket, cache: Path, fault: str):
    name = "data/chunk-000/file-001.parquet"
    bucket.faults[name] = [fault]
    pauses: list[float] = []
    storage.fetch(bucket, URL, wait=pauses.append)
    assert bucket.read.count(name) == 2 and pauses == [downloads.WAITS_S[0]]

    bucket.pipe("/bucket/sets/arm/meta/extra.json", b'{"more": 1}')
    bucket.faults["meta/extra.json"] = [fault] * 4
    reason = "ConnectionResetError" if fault == "drop" else "8 bytes arrived, the storage lists 11"
    with pytest.raises(DataError, match=f"meta/extra.json: could not be read in 4 attempts.*{reason}"):
        storage.fetch(bucket, URL, wait=no_pause)


def test_a_copy_that_was_stopped_is_no_dataset_and_goes_on_where_it_was(bucket: Bucket, cache: Path):
    name = "meta/tasks.parquet"
    bucket.faults[name] = ["drop"] * 4
    with pytest.raises(DataError, match=name):
        storage.fetch(bucket, URL, wait=no_pause)
    assert not list(cache.glob("[!.]*"))
    complete = {n for n in bucket.read if bucket.read.count(n) == 1}
    before = len(bucket.read)
    root = storage.fetch(bucket, URL)
    assert len(names(root)) == 13
    assert name in bucket.read[before:] and len(bucket.read) - before <= 13 - len(complete) + storage.AT_ONCE


def test_a_file_that_is_gone_or_forbidden_is_named_at_once(bucket: Bucket):
    bucket.faults["meta/info.json"] = ["gone"]
    with pytest.raises(DataError, match="meta/info.json: cannot be read: FileNotFoundError"):
        storage.fetch(bucket, URL, wait=no_pause)
    assert bucket.read.count("meta/info.json") == 1


def test_files_that_are_written_while_they_are_copied_are_refused(bucket: Bucket, cache: Path):
    def write_meanwhile(seconds: float) -> None:
        bucket.pipe("/bucket/sets/arm/meta/stats.json", b"{}")
        bucket.pipe(
            "/bucket/sets/arm/meta/tasks.parquet", bucket.cat_file("/bucket/sets/arm/meta/tasks.parquet")
        )

    bucket.faults["meta/info.json"] = ["drop"]
    with pytest.raises(DataError, match="changed while it was copied.*meta/tasks.parquet"):
        storage.fetch(bucket, URL, wait=write_meanwhile)
    assert not list(cache.glob("[!.]*"))
    assert "meta/stats.json" in names(storage.fetch(bucket, URL))


def test_bytes_that_differ_from_the_storages_checksum_are_copied_again(bucket: Bucket):
    class Google(Bucket):
        def find(self, path: str, **options: Any) -> Any:
            listed = super().find(path, **options)
            for name, info in listed.items():
                info["md5Hash"] = base64.b64encode(hashlib.md5(self.cat_file(name)).digest()).decode()
            return listed

    bucket.__class__ = Google
    bucket.faults["meta/info.json"] = ["flip"]
    storage.fetch(bucket, URL, wait=no_pause)
    assert bucket.read.count("meta/info.json") == 2
    bucket.pipe("/bucket/sets/arm/meta/extra.json", b"{}")
    bucket.faults["meta/extra.json"] = ["flip"] * 4
    with pytest.raises(DataError, match="meta/extra.json: other bytes"):
        storage.fetch(bucket, URL, wait=no_pause)


def test_a_copy_that_lost_a_file_is_never_read(bucket: Bucket):
    root = storage.fetch(bucket, URL)
    (root / "meta" / "tasks.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="1 files of the copy.*meta/tasks.parquet; delete"):
        storage.fetch(bucket, URL)


def test_two_processes_that_open_it_at_once_copy_it_once(bucket: Bucket):
    roots: list[Path] = []
    both = [Thread(target=lambda: roots.append(storage.fetch(bucket, URL))) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert len(bucket.read) == 13 and roots[0] == roots[1]


def test_sizes_are_told_before_anything_is_copied_and_a_full_disk_is_refused(
    bucket: Bucket, cache: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO, logger="vlafit.datasets.downloads"):
        storage.fetch(bucket, URL)
        size = sum(len(bucket.cat_file(name)) for name in bucket.store)
        assert f"{URL}: 13 files, {downloads.as_text(size)}; copying 13" in caplog.text
        caplog.clear()
        storage.fetch(bucket, URL)
        assert not caplog.text
    with pytest.raises(DataError, match=r"4 files, 9.0 EB|4 files, 9000000.0 TB.*has room for.*VLAFIT_CACHE"):
        downloads.announce(URL, 4, 9 * 10**18, 2, 9 * 10**18, cache)


def test_metadata_that_names_a_file_which_is_not_there_stops_before_the_rest_is_copied(
    published: MemoryFileSystem, folder: Path, cache: Path
):
    published.rm("/bucket/sets/arm/data/chunk-000/file-001.parquet")
    card = replace(load_card(folder), path=URL)
    with pytest.raises(DataError, match=r"data/chunk-000/file-001.parquet is missing.*\(episode 4\)"):
        open_dataset(card)
    assert not [name for name in names(cache) if "videos" in name]


def test_a_name_that_leads_out_of_the_folder_is_refused(bucket: Bucket, tmp_path: Path):
    bucket.store["/bucket/sets/arm/../../evil"] = bucket.store["/bucket/sets/arm/meta/info.json"]
    with pytest.raises(DataError, match="'../../evil', which leads out"):
        storage.fetch(bucket, URL)


def test_an_address_with_nothing_is_refused_and_one_without_network_names_the_copy(bucket: Bucket):
    with pytest.raises(DataError, match="memory://bucket/sets/leg: nothing is there"):
        storage.fetch(bucket, "memory://bucket/sets/leg")
    root = storage.fetch(bucket, URL)
    pauses: list[float] = []

    class Unreachable(Bucket):
        def find(self, path: str, **options: Any) -> Any:
            raise ConnectionError("no route")

    bucket.__class__ = Unreachable
    with pytest.raises(
        DataError, match=f"could not be read in 4 attempts: ConnectionError: no route.*earlier is {root}"
    ):
        storage.fetch(bucket, URL, wait=pauses.append)
    assert pauses == list(downloads.WAITS_S)


def test_storage_that_drops_the_list_of_its_files_is_asked_again(bucket: Bucket):
    class Dropping(Bucket):
        drops = 2

        def find(self, path: str, **options: Any) -> Any:
            Dropping.drops -= 1
            if Dropping.drops >= 0:
                raise ConnectionResetError("reset by peer")
            return super().find(path, **options)

    bucket.__class__ = Dropping
    pauses: list[float] = []
    assert len(names(storage.fetch(bucket, URL, wait=pauses.append))) == 13
    assert pauses == list(downloads.WAITS_S[:2])


@pytest.mark.parametrize(
    ("url", "fact"),
    [
        ("file:///data/set", "its path"),
        ("ftp://host/set", "rclone"),
        ("https://huggingface.co/datasets/lerobot/pusht", "by its id: lerobot/pusht$"),
        ("https://huggingface.co/datasets/lerobot/pusht/tree/main?x=1", "by its id: lerobot/pusht$"),
        ("https://hf.co/datasets/lerobot/pusht/blob/v3.0/meta/info.json", "by its id: lerobot/pusht@v3.0$"),
        ("hf://models/org/name", "hf://datasets/ORG/NAME"),
    ],
)
def test_a_url_that_is_not_read_is_refused_with_a_way_to_get_the_files(url: str, fact: str):
    with pytest.raises(ConfigError, match=fact):
        open_dataset(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://me:SECRET@127.0.0.1:9/set",
        "https://SECRET@h/set",
        "https://h/set?sig=SECRET",
        "s3://k:SECRET@b/set",
    ],
)
def test_a_password_or_query_in_a_url_is_refused_and_not_shown(url: str):
    with pytest.raises(ConfigError, match="set: holds a password or a query") as caught:
        open_dataset(url)
    assert "SECRET" not in str(caught.value)


def test_storage_whose_package_is_missing_names_it():
    with pytest.raises(ConfigError, match=r"s3://bucket/set: .* package no_such_s3fs .*pip install"):
        storage.connect("s3", "no_such_s3fs", "s3://bucket/set")


def test_without_a_cache_a_url_is_refused(bucket: Bucket, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLAFIT_CACHE", "off")
    with pytest.raises(ConfigError, match="VLAFIT_CACHE is off"):
        storage.fetch(bucket, URL)
