"""Ids of the Hugging Face Hub: from its cache, from a server that answers as the Hub does, or one error."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import close_session, constants

import vlafit
from tests.train.world import tiny, write_dots
from tests.tuning.world import make_policy, rules, train, velocity
from vlafit import checkpoints, cli, config
from vlafit.checkpoints import hub, locate
from vlafit.codec import train_word_tokenizer
from vlafit.errors import ConfigError, WeightsError
from vlafit.recipe import AdaptRecipe, PolicyRecipe
from vlafit.train.data import open_data
from vlafit.train.preflight import meta_policy

OPENPI = Path(__file__).parents[1] / "fixtures" / "openpi_pi0"
COMMIT, OLDER = "a" * 40, "b" * 40
TOLD = {"vision.heads": 2, "chunk": 6}
WORDS = ["--config", "vision.heads=2", "--config", "chunk=6"]


def put_in_cache(cache: Path, source: Path, name: str = "tiny", commit: str = COMMIT) -> Path:
    """Lay a repository out as huggingface_hub does, and return its snapshot."""
    repository = cache / f"models--acme--{name}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    return Path(shutil.copytree(source, repository / "snapshots" / commit))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def run(environment: dict[str, str], *words: str, folder: Path) -> subprocess.CompletedProcess:
    """Run the command line in a process of its own, whose huggingface_hub reads `environment`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    kept |= {"PYTHONPATH": str(Path(vlafit.__file__).parents[1]), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-m", "vlafit", *words]
    return subprocess.run(
        command, env=kept | environment, cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )


# ------------------------------------------------------------------------------------------ from the cache


def test_an_id_is_loaded_from_the_cache_and_the_report_tells_the_commit(cache: Path):
    put_in_cache(cache, OPENPI)
    policy, _, _, report = vlafit.load_checkpoint("acme/tiny", config=TOLD)
    local = vlafit.load_policy(OPENPI, config=TOLD)
    assert all(torch.equal(p, policy.get_parameter(n)) for n, p in local.named_parameters())
    assert report.notes[0] == f"acme/tiny of the Hugging Face Hub, main at commit {COMMIT}"
    put_in_cache(cache, OPENPI, commit=OLDER)
    (cache / "models--acme--tiny" / "refs" / "main").write_text(COMMIT)
    found = locate.place(f"acme/tiny@{OLDER}")
    assert (found.path.name, found.name) == (OLDER, f"acme/tiny@{OLDER}")
    assert locate.place(locate.place("acme/tiny").name).path == locate.place("acme/tiny").path


def test_a_path_that_exists_is_never_looked_for_on_the_hub(cache: Path, monkeypatch: pytest.MonkeyPatch):
    put_in_cache(cache, OPENPI)
    shutil.copytree(OPENPI, "acme/tiny")
    monkeypatch.setattr(hub, "_on_hub", lambda reference, patterns: pytest.fail("the Hub was asked"))
    assert locate.place("acme/tiny").path == Path("acme/tiny")
    assert vlafit.load_checkpoint("acme/tiny", config=TOLD).report.notes == ()
    with pytest.raises(WeightsError, match="there is no such checkpoint"):
        vlafit.load_policy(Path("acme/other"))


@pytest.mark.parametrize(
    "said", ["a/b/c", "tiny", "acme/model.safetensors", "../tiny", "/acme/tiny", "a/b@", ""]
)
def test_what_is_no_id_is_not_taken_for_one(cache: Path, said: str):
    assert hub.parse(said) is None
    with pytest.raises(ConfigError):
        locate.place(said)


def test_adapters_remember_the_commit_of_their_base_and_are_verified(cache: Path):
    base = make_policy()
    vlafit.save_checkpoint(base, "native")
    snapshot = put_in_cache(cache, Path("native"))
    policy = vlafit.load_policy("acme/tiny")
    plan = vlafit.apply_strategy(policy, rules("lora"))
    train(policy)
    vlafit.save_checkpoint(policy, "adapted", plan=plan, base="acme/tiny")
    said = json.loads(Path("adapted/base.json").read_text())
    assert said["checkpoint"] == f"acme/tiny@{COMMIT}"
    assert torch.equal(velocity(vlafit.load_policy("adapted")), velocity(policy))
    assert torch.equal(velocity(vlafit.load_checkpoint("adapted", base="native").policy), velocity(policy))
    shutil.rmtree(snapshot)
    with pytest.raises(WeightsError, match=r"adapted: .*acme/tiny@a+"):
        vlafit.load_policy("adapted")


def test_a_digest_is_of_what_is_read_whatever_else_was_downloaded(tmp_path: Path):
    folder = Path(shutil.copytree(OPENPI, tmp_path / "one"))
    before = checkpoints.digest(folder)
    (folder / "README.md").write_text("words")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    (folder / "optimizer.pt").write_bytes(b"1")
    assert checkpoints.digest(folder) == before
    (folder / "model.safetensors").write_bytes(b"1")
    assert checkpoints.digest(folder) != before
    bare = Path(shutil.copytree(OPENPI.parent / "openpi_jax/ckpt_pure/params", tmp_path / "params"))
    before = checkpoints.digest(bare)
    (bare / "manifest.ocdbt").write_bytes(b"1")
    assert checkpoints.digest(bare) != before


def test_every_verb_takes_an_id(cache: Path, capsys: pytest.CaptureFixture):
    vlafit.save_checkpoint(make_policy(), "native")
    put_in_cache(cache, Path("native"))
    assert cli.main(["inspect", "acme/tiny", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["checkpoint"] == f"acme/tiny@{COMMIT}" and COMMIT in facts["report"]["notes"][0]
    assert cli.main(["export", "acme/tiny", "--to", "transformers", "--out", "out"]) == 0
    assert f"note: from acme/tiny of the Hugging Face Hub, commit {COMMIT}" in capsys.readouterr().out
    assert cli.main(["eval", "acme/tiny", "--protocol", "pusht"]) == 2
    assert "has no codec, which says what its numbers mean" in capsys.readouterr().err
    assert [p.name for p in Path(".").iterdir() if p.name not in ("hub", "native", "out")] == []


def test_a_run_that_begins_on_the_hub_records_the_commit(cache: Path, capsys: pytest.CaptureFixture):
    put_in_cache(cache, OPENPI)
    recipe = tiny(
        write_dots(Path(".")),
        data={"statistics": "data"},
        optim={"ema": 0.0},
        train={"steps": 1, "batch_size": 2, "draws": 1, "validate_every": 0, "save_every": 1},
    )
    train_word_tokenizer([f"number {n} and {n * n}" for n in range(400)], 500).save(Path("words"))
    sizes = {**TOLD, "action_dim": 32}
    start = PolicyRecipe(checkpoint="acme/tiny", config=sizes, resize="keep", tokenizer="words")
    slots = {"base_0_rgb": "front", "left_wrist_0_rgb": "", "right_wrist_0_rgb": ""}
    recipe = replace(recipe, adapt=AdaptRecipe(cameras=slots))
    Path("recipe.toml").write_text(config.dump(replace(recipe, policy=start, strategy="lora")))
    assert cli.main(["train", "recipe.toml", "--out", "run"]) == 0
    told = json.loads(Path("run/run.json").read_text())["load_report"]
    assert f"note: acme/tiny of the Hugging Face Hub, main at commit {COMMIT}" in told
    said = json.loads(Path("run/checkpoints/step_000001/base.json").read_text())
    assert said["checkpoint"] == f"acme/tiny@{COMMIT}"
    assert vlafit.load_policy("run/checkpoints/step_000001") is not None
    # A comparison and a sweep look at the same start from its headers, before anything is trained.
    codec_too = replace(start, config={**start.config, "codec.prompt": "pi0"})
    recipe = replace(recipe, policy=codec_too)
    policy = meta_policy(recipe, open_data(recipe.data, 0))
    assert policy.config.action_dim == 32 and next(policy.parameters()).is_meta


# ------------------------------------------------------------------------------------------ from a server


class Hub(BaseHTTPRequestHandler):
    """What snapshot_download asks of the Hub, for one repository, a gated one, and none."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]
    asked: list[str]

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.asked.append(f"{self.command} {path}")
        if path == "/api/models/acme/tiny/revision/main":
            listed = [{"rfilename": name} for name in self.files]
            self.answer(200, json.dumps({"id": "acme/tiny", "sha": COMMIT, "siblings": listed}).encode())
        elif path.startswith("/api/models/acme/tiny/revision/"):
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif path == f"/api/models/acme/tiny/tree/{COMMIT}":
            listed = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            self.answer(200, json.dumps(listed).encode())
        elif path.startswith(start := f"/acme/tiny/resolve/{COMMIT}/"):
            data = self.files[path.removeprefix(start)]
            tags = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
            self.answer(200, data, tags)
        elif "/gated" in path:
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """Its address, and what it was asked."""
    names = [p for p in OPENPI.rglob("*") if p.is_file()]
    files = {p.relative_to(OPENPI).as_posix(): p.read_bytes() for p in names}
    files |= {"README.md": b"words", "optimizer.pt": b"a pickle", "training_state/step.json": b"{}"}
    asked: list[str] = []
    handler = type("OneHub", (Hub,), {"files": files, "asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()
        thread.join()


def test_an_id_is_downloaded_once_and_only_what_is_read(
    server: tuple[str, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    address, asked = server
    home = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}
    done = run(home, "inspect", "acme/tiny", *WORDS, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"note: acme/tiny of the Hugging Face Hub, commit {COMMIT}" in done.stdout
    fetched = {line.split(f"{COMMIT}/")[1] for line in asked if "/resolve/" in line}
    assert "model.safetensors" in fetched and "assets/my_robot/norm_stats.json" in fetched
    assert not fetched & {"README.md", "optimizer.pt", "training_state/step.json"}
    asked.clear()
    assert ask(monkeypatch, address, tmp_path / "home", False, "inspect", "acme/tiny", *WORDS) == 0
    assert (capsys.readouterr().out, asked) == (done.stdout, [])


def ask(patch: pytest.MonkeyPatch, address: str, home: Path, offline: bool, *words: str) -> int:
    """Run the command line here, as if HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE had been set at the start."""
    for name in [key for key in os.environ if "proxy" in key.lower()]:
        patch.delenv(name)
    close_session()  # of an earlier test, which may know of a proxy
    patch.setattr(constants, "ENDPOINT", address)
    urls = address + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", urls)
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    patch.setattr(constants, "HF_HUB_OFFLINE", offline)
    return cli.main(list(words))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("acme/none", "there is none, or it is private and you are not logged in"),
        ("acme/gated", "it is gated: accept its terms at"),
        ("acme/tiny@nope", "it has no revision 'nope'"),
    ],
)
def test_what_the_hub_refuses_is_one_message(
    server: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], said: str, message: str,
):  # fmt: skip
    assert ask(monkeypatch, server[0], tmp_path / "home", False, "inspect", said) == 2
    shown = capsys.readouterr()
    assert message in shown.err and len(shown.err.splitlines()) == 1 and shown.out == ""
    assert server[1] and list((tmp_path / "home").rglob("*.safetensors")) == []


@pytest.mark.parametrize("offline", [True, False])
def test_offline_and_not_cached_is_one_message_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], offline: bool
):
    words = ("export", "acme/tiny", "--to", "openpi", "--out", str(tmp_path / "out"))
    assert ask(monkeypatch, "http://127.0.0.1:9", tmp_path / "home", offline, *words) == 2
    shown = capsys.readouterr()
    assert "it is not wholly in the cache, and" in shown.err and "hf download acme/tiny" in shown.err
    assert ("HF_HUB_OFFLINE is set" in shown.err) is offline
    assert len(shown.err.splitlines()) == 1 and shown.out == ""
    assert list(tmp_path.iterdir()) == []
