"""Evaluating through a server is the same evaluation, byte for byte."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.rollout.conftest import make_protocol
from tests.rollout.test_checkpoint import save_checkpoint
from tests.rollout.toy_env import robot
from vlafit.actor import load_actor
from vlafit.errors import RemoteError
from vlafit.rollout import evaluate
from vlafit.serve.client import connect
from vlafit.serve.control import Controller
from vlafit.serve.describe import describe
from vlafit.serve.options import Options
from vlafit.serve.server import serving
from vlafit.types import EpisodeKey, Observation


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("run") / "checkpoint", robot())


def contents(folder: Path) -> dict[str, object]:
    """Everything that an evaluation wrote, without the seconds that it took."""
    seen: dict[str, object] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix in (".json", ".jsonl"):
            text = path.read_text()
            lines = [json.loads(text)] if path.suffix == ".json" else map(json.loads, text.splitlines())
            seen[name] = [{k: v for k, v in line.items() if k not in ("wall_s", "seconds")} for line in lines]
        else:
            seen[name] = path.read_bytes()
    return seen


def test_a_served_policy_is_evaluated_as_a_local_one(checkpoint: Path, tmp_path: Path) -> None:
    local = load_actor(checkpoint, steps=2, width=4)
    evaluate(local, make_protocol(), tmp_path / "local", workers=1, videos=4)
    with (
        serving(local, describe(local), Options(port=0)) as running,
        connect(running.address) as first,
        connect(running.address) as second,
    ):
        evaluate(first, make_protocol(), tmp_path / "remote", workers=2, videos=4)
        assert second.fingerprint() == local.fingerprint() and second.embodiment == local.embodiment
    one, other = contents(tmp_path / "local"), contents(tmp_path / "remote")
    assert len(one) > 12 and set(one) == set(other)
    assert one == other


def test_an_unusual_state_is_logged_by_the_session_of_its_client_only(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    actor = load_actor(checkpoint, steps=2, width=1)
    images = {c.name: np.zeros(c.shape, np.uint8) for c in actor.embodiment.cameras}
    far = Observation(images, np.full(actor.embodiment.state.shape, 1e4, np.float32), "go left")
    with serving(actor, describe(actor), Options(port=0)) as running, connect(running.address) as remote:
        remote.act([far], [EpisodeKey(0, "left", 0)])
    lines = [record.getMessage() for record in caplog.records if record.name != "vlafit.serve.client"]
    unusual = [line for line in lines if "far outside" in line]
    assert unusual and all(line.startswith("a client's ") for line in unusual)
    caplog.clear()
    actor.act([far], [EpisodeKey(0, "left", 0)])
    assert len([r for r in caplog.records if "far outside" in r.getMessage()]) == len(unusual), (
        "by itself again"
    )


def test_what_other_robots_ask_changes_no_bit_of_an_answer(checkpoint: Path) -> None:
    local = load_actor(checkpoint, steps=2, width=4)
    size = robot().cameras[0].shape
    rng = np.random.default_rng(0)
    observations = [
        Observation(
            {"front": rng.integers(0, 256, size, np.uint8)}, np.float32([0.1, i / 9]), "go to the left"
        )
        for i in range(9)
    ]
    keys = [EpisodeKey(i, "left", 0) for i in range(9)]
    alone = [local.act([o], [k])[0].actions.tobytes() for o, k in zip(observations, keys, strict=True)]
    with (
        serving(local, describe(local), Options(port=0)) as running,
        connect(running.address) as one,
        connect(running.address) as other,
    ):
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(2) as pool:
            halves = [
                pool.submit(one.act, observations[:5], keys[:5]),
                pool.submit(other.act, observations[5:], keys[5:]),
            ]
            answers = [chunk.actions.tobytes() for half in halves for chunk in half.result(timeout=60)]
    assert answers == alone


@contextmanager
def command(*words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run `vlafit serve` and yield its process and address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "vlafit", "serve", *words, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = re.search(r"ws://\S+:\d+", line)
        assert address, (line, process.communicate(timeout=60))
        yield process, address[0]
    finally:
        process.kill()
        process.communicate()


def vlafit(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vlafit", *words],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_a_local_and_a_served_actor_compute_the_same_bytes_by_default(checkpoint: Path) -> None:
    local = load_actor(checkpoint)
    assert local.width == local.rows == 1  # one robot, for which more rows only take longer
    seen = {"front": np.full(robot().cameras[0].shape, 7, np.uint8)}
    sent = []
    with command(str(checkpoint)) as (_, address), connect(address) as remote:
        assert remote.fingerprint() == local.fingerprint()
        for actor in (local, remote):
            with Controller(actor) as control:
                control.start("go to the left")
                sent.append([control.step(seen, np.float32([0.1, i / 9])).tobytes() for i in range(10)])
    assert sent[0] == sent[1]


@pytest.mark.slow
def test_the_command_line_serves_evaluates_and_stops(checkpoint: Path, tmp_path: Path) -> None:
    protocol = tmp_path / "toy.toml"
    protocol.write_text(
        'name = "toy"\ntasks = ["left"]\ntrials = 2\nfirst_seed = 100\nhorizon = 12\nreplan = 4\n'
        '[env]\nname = "tests.rollout.toy_env"\nsize = 16\n'
    )
    token = tmp_path / "token"
    token.write_text("0123456789abcdef0123456789abcdef\n")
    token.chmod(0o600)
    out = tmp_path / "remote"
    ask = ("eval", "--protocol", str(protocol), "--workers", "1", "--videos", "1")
    with command(str(checkpoint), "--max-batch", "4", "--token-file", str(token)) as (process, address):
        remote = vlafit(*ask, "--actor", address, "--token-file", str(token), "--out", str(out))
        assert remote.returncode == 0, remote.stderr
        refused = vlafit(*ask, "--actor", address, "--out", str(tmp_path / "refused"))
        assert refused.returncode == 2 and "401" in refused.stderr and "Traceback" not in refused.stderr
        with connect(address, token=token.read_text().strip()) as idle:
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 0
            with pytest.raises(RemoteError, match="cannot be reached"):
                idle.act([Observation({}, np.zeros(2, np.float32), "x")], [EpisodeKey(0, "left", 0)])
    local = vlafit(*ask, str(checkpoint), "--max-batch", "4", "--out", str(tmp_path / "local"))
    assert local.returncode == 0, local.stderr
    assert contents(out) == contents(tmp_path / "local")


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (("serve", "x", "--host", "0.0.0.0"), "--token-file"),
        (("serve", "x", "--map", "image"), "KEY=NAME"),
        (("serve", "x", "--map", "a=front", "--map", "a=wrist"), "'a' twice"),
        (("serve", "x", "--map", "left_wrist=right_wrist"), "'left_wrist' names the left hand"),
        (("serve", "x", "--map", "observation/cam_r=left_wrist"), "names the right hand"),
        (("serve", "x", "--token-file", "nowhere"), "nowhere"),
        (("serve", "x", "--max-clients", "0"), "--max-clients: must be a whole number from 1"),
        (("serve", "no-such-checkpoint"), "no-such-checkpoint"),
        (("eval", "--protocol", "metaworld-faucet"), "--actor"),
        (("eval", "x", "--actor", "ws://x", "--protocol", "metaworld-faucet"), "--actor"),
        (("eval", "--actor", "ws://x", "--steps", "3", "--protocol", "metaworld-faucet"), "--steps"),
        (("eval", "--actor", "ws://x", "--compile", "--protocol", "metaworld-faucet"), "--compile"),
        (("eval", "--actor", "ws://x", "--dtype", "bfloat16", "--protocol", "metaworld-faucet"), "--dtype"),
        (("eval", "--actor", "ws://x", "--quantise", "int8", "--protocol", "metaworld-faucet"), "--quantise"),
        (("eval", "x", "--token-file", "t", "--protocol", "metaworld-faucet"), "--token-file"),
    ],
)
def test_options_that_cannot_be_are_one_message(
    words: tuple[str, ...], fact: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from vlafit.cli import main

    assert main(words) == 2
    message = capsys.readouterr().err
    assert message.startswith("vlafit: ") and fact in message


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        ("serve metaworld-base --base nope", "--base: .*'nope'"),
        ("serve metaworld-base --embodiment nope", "no embodiment 'nope'"),
        ("serve metaworld-base --device nope", "device 'nope'"),
        ("serve metaworld-base --recipe nope", "no recipe 'nope'"),
        ("serve metaworld-base --map a=nope", "--map. 'a' = 'nope'"),
        ("eval metaworld-base --data metaworld-faucet --base nope", "--base: .*'nope'"),
        ("eval metaworld-base --data metaworld-faucet --episodes nope", "no episode 'nope'"),
        ("eval metaworld-base --data metaworld-faucet --outside nope", "--outside: .*'nope'"),
        ("eval metaworld-base --data metaworld-faucet --confirm-cameras nope", "--confirm-cameras 'nope'"),
        ("eval metaworld-base --protocol metaworld-faucet --shard nope", "shard 'nope'"),
    ],
)
def test_a_name_that_does_not_exist_is_refused_with_its_option(
    words: str, fact: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlafit.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    assert re.search(fact, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_a_token_that_others_can_read_or_guess_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from vlafit.cli import main

    token = tmp_path / "token"
    for text, mode, fact in (("0123456789abcdef", 0o644, "chmod 600"), ("short", 0o600, "at least 16")):
        token.write_text(text)
        token.chmod(mode)
        assert main(["serve", "x", "--token-file", str(token)]) == 2
        assert fact in capsys.readouterr().err


def test_an_actor_is_loaded_from_a_runs_folder(checkpoint: Path, tmp_path: Path) -> None:
    import shutil

    import vlafit

    run = tmp_path / "run"
    shutil.copytree(checkpoint, run / "checkpoints" / "20")
    for name in ("last", "best"):
        (run / "checkpoints" / f"{name}.json").write_text(json.dumps({"path": "20"}))
    expected = vlafit.load_actor(checkpoint).fingerprint()
    for path in (run, str(run), run / "checkpoints" / "best", run / "checkpoints" / "20"):
        assert vlafit.load_actor(path).fingerprint() == expected
