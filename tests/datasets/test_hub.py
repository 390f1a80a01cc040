"""Datasets of the Hugging Face Hub, served by this process: the commit, whole copies, and no network."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest
from huggingface_hub import constants

from tests.datasets import corruptions
from tests.datasets.layouts import demos, write_libero
from tests.datasets.test_remote import assert_same, names
from tests.datasets.web_server import serving
from vlafit import cli
from vlafit.datasets import downloads, load_card, open_dataset
from vlafit.datasets.layouts import lerobot
from vlafit.errors import ConfigError, DataError
from vlafit.recipe import DataRecipe
from vlafit.train.data import open_data

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server answers, and what it was asked for."""

    files: dict[str, bytes]
    read: list[str] = field(default_factory=list)
    lies: dict[str, int] = field(default_factory=dict)
    """Sizes that the list gives and the files do not have."""
    first: str = ""
    """How the first request for each path fails: "drop", or a status."""
    always: str = ""
    asked: list[tuple[str, str]] = field(default_factory=list)
    address: str = ""
    redirect: str = ""
    """Another server that has the files' content, as the Hub's does."""
    tokens: set[str] = field(default_factory=set)
    """What requests for files were authorised by."""


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            request = (self.command, path + self.headers.get("Range", ""))
            fault = hub.always or (hub.first if request not in hub.asked else "")
            hub.asked.append(request)
            if fault:
                self.close_connection = True
                if fault != "drop":
                    self.send_response(int(fault))
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                return
            if path.startswith("/api/datasets/org/arm"):
                siblings = [
                    {"rfilename": name, "size": hub.lies.get(name, len(content)), "blobId": name}
                    for name, content in hub.files.items()
                ]
                self.answer(json.dumps({"id": "org/arm", "sha": COMMIT, "siblings": siblings}).encode())
            elif path.startswith(f"/datasets/org/arm/resolve/{COMMIT}/"):
                name = path.split(f"{COMMIT}/")[1]
                if self.command == "GET":
                    hub.read.append(name)
                    hub.tokens.add(self.headers.get("Authorization", ""))
                if hub.redirect:
                    self.send_response(302)
                    self.send_header("Location", f"{hub.redirect}/{name}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.answer(hub.files[name])
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        def answer(self, content: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    return Handler


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "arm"
    corruptions.video(folder, demos(3))
    return folder


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub({name: (folder / name).read_bytes() for name in sorted(names(folder))})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("VLAFIT_CACHE", str(tmp_path / "cache"))
    connect(monkeypatch, hub.address, tmp_path)
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


def connect(monkeypatch: pytest.MonkeyPatch, address: str, tmp_path: Path) -> None:
    """Let huggingface_hub take a server for the Hub; it reads these when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def disconnect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()


@pytest.mark.parametrize("text", ["org/arm", "org/arm@main"])
def test_a_dataset_of_the_hub_is_copied_at_a_commit_once_and_reads_as_its_folder(
    hub: Hub, folder: Path, text: str
):
    store = open_dataset(text)
    assert_same(store, open_dataset(folder))
    assert COMMIT in store.card.path
    assert sorted(hub.read) == sorted(hub.files)
    open_dataset(text)
    assert len(hub.read) == len(hub.files)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("org/arm", "drop"),  # the Hub's client pauses by itself after other faults
        ("hf://datasets/org/arm", "drop"),
        ("hf://datasets/org/arm", "503"),
        ("hf://datasets/org/arm", "429"),
    ],
)
def test_a_hub_that_fails_at_the_first_request_for_anything_is_read_to_the_end(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, text: str, fault: str
):
    monkeypatch.setattr(downloads, "WAITS_S", (0.0, 0.0, 0.0))
    hub.first = fault
    assert_same(open_dataset(text), open_dataset(folder))


@pytest.mark.parametrize("fault", ["drop", "503"])
def test_a_hub_that_always_fails_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch, fault: str):
    monkeypatch.setattr(downloads, "WAITS_S", (0.0, 0.0, 0.0))
    hub.always = fault
    with pytest.raises(DataError, match="org/arm: could not be read in 4 attempts"):
        open_dataset("hf://datasets/org/arm")
    # huggingface_hub may ask for other things, and an attempt may end on a kept connection that was closed.
    assert len([path for _, path in hub.asked if path == "/api/datasets/org/arm"]) in (3, 4)


def test_a_url_of_the_hub_is_read_in_place_at_a_commit(hub: Hub, folder: Path):
    store = open_dataset("hf://datasets/org/arm")
    assert {name for name in hub.read if "videos" in name} == set()
    assert store.card.source == f"hf://datasets/org/arm@{COMMIT}"
    assert_same(store, open_dataset(folder))
    before = len(hub.read)
    assert_same(open_dataset("hf://datasets/org/arm@main"), store)
    assert len(hub.read) == before


def test_without_a_network_files_of_the_hub_that_are_kept_are_read(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    store = open_dataset("hf://datasets/org/arm")
    assert_same(store, open_dataset(folder))
    disconnect(monkeypatch)
    before = len(hub.read)
    assert_same(open_dataset("hf://datasets/org/arm"), store)
    assert "the Hub cannot be reached" in caplog.text and len(hub.read) == before


def test_a_token_is_sent_to_the_hub_and_not_where_it_redirects_to(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    with serving(dict(hub.files)) as other:
        hub.redirect = other.address
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        assert_same(open_dataset("hf://datasets/org/arm"), open_dataset(folder))
        assert set(other.names()) == set(hub.files)
        assert hub.tokens == {"Bearer hf_secret"} and other.tokens == {""}


def test_a_card_of_the_hub_names_the_commit_and_copies_what_it_reads(
    hub: Hub, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["data", "card", "org/arm"]) == 0
    assert {name.split("/")[0] for name in hub.read} == {"meta"}
    path = tmp_path / "arm.toml"
    path.write_text(capsys.readouterr().out.replace('control = ""', 'control = "delta_pose"'))
    card = load_card(path)
    assert card.path == f"hf://datasets/org/arm@{COMMIT}" and card.name == "arm"
    card = replace(card, section=lerobot.Section(episodes=(0,)), expect=type(card.expect)())
    store = open_dataset(card)
    assert_same(store, open_dataset(replace(card, path=str(folder))))
    assert {name for name in hub.read if "file-001" in name and "meta" not in name} == set()


def test_a_dataset_of_the_hub_has_the_name_of_its_repository_whatever_the_revision(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    store = open_dataset("org/arm@refs/pr/1")
    assert store.card.name == "arm" and COMMIT in store.card.path
    assert load_card(store.card.path).name == "arm"
    for place in ("org/arm", store.card.path, f"hf://datasets/org/arm@{COMMIT}"):
        assert cli.main(["data", "inspect", place]) == 0
        assert capsys.readouterr().out.startswith("arm: layout lerobot")
        assert cli.main(["data", "card", place]) == 0
        assert 'name = "arm"\n' in capsys.readouterr().out
    with pytest.raises(ConfigError) as refused:
        open_data(DataRecipe(cards=("org/arm", "org/arm@refs/pr/1")), 0)
    assert "2 cards are called 'arm'" in str(refused.value)
    assert "vlafit data card org/arm@refs/pr/1 > arm-2.toml" in str(refused.value)
    assert cli.main(["data", "card", "org/arm@refs/pr/1"]) == 0
    other = tmp_path / "arm-2.toml"
    text = capsys.readouterr().out.replace('control = ""', 'control = "delta_pose"')
    other.write_text(text.replace('name = "arm"', 'name = "arm-2"'))
    assert load_card(other).name == "arm-2"


def test_without_a_network_the_whole_copy_is_read_and_part_of_it_never(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    whole = open_dataset("org/arm")
    disconnect(monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert_same(open_dataset("org/arm"), whole)
    assert "cannot be reached" in caplog.text and COMMIT in caplog.text
    (Path(whole.card.path) / "meta" / "tasks.parquet").unlink()
    with pytest.raises(DataError, match="1 files of the copy.*meta/tasks.parquet"):
        open_dataset("org/arm")


def test_without_a_network_hdf5_files_that_nobody_counted_are_refused(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_libero(tmp_path / "libero", demos(1))
    hub.files = {name: (tmp_path / "libero" / name).read_bytes() for name in names(tmp_path / "libero")}
    first = next(iter(hub.files))
    huggingface_hub.hf_hub_download("org/arm", first, revision=COMMIT, repo_type="dataset")
    disconnect(monkeypatch)
    with pytest.raises(DataError, match="nothing tells whether the copy at .* is whole"):
        open_dataset(f"org/arm@{COMMIT}")


def test_a_file_of_another_size_than_the_hub_lists_is_refused(hub: Hub):
    hub.lies["meta/tasks.parquet"] = 7
    with pytest.raises(DataError, match="the Hub lists 7 for meta/tasks.parquet"):
        open_dataset("org/arm")


def test_a_dataset_that_the_hub_does_not_have_is_refused_by_name(hub: Hub):
    with pytest.raises(DataError, match=r"org/leg: .*cannot be had.*hf download --repo-type dataset org/leg"):
        open_dataset("org/leg")
