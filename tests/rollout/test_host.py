"""Environments on another machine, over TCP, play what vlafit's own play, and fail as clearly."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest

from tests.rollout.actors import Obedient
from tests.rollout.conftest import FAULTS, TOY, require_errors_of_their_tasks
from tests.waiting import wait_until
from vlafit.envs import EnvSpec, host
from vlafit.envs.messages import Hello, Start
from vlafit.envs.wire import encode
from vlafit.errors import SimulationError
from vlafit.rollout import Protocol, Result, evaluate

Make = Callable[..., Protocol]


@contextmanager
def serving() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "vlafit.envs.host", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        yield process
        process.terminate()


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    with serving() as process:
        yield process


def address_of(server: subprocess.Popen[str]) -> str:
    assert server.stderr is not None
    line = server.stderr.readline()
    threading.Thread(target=server.stderr.read, daemon=True).start()
    found = re.fullmatch(r"environments at (tcp://127\.0\.0\.1:\d+)\n", line)
    assert found is not None, line
    return found[1]


@pytest.fixture(scope="module")
def address(server: subprocess.Popen[str]) -> str:
    return address_of(server)


def there(protocol: Protocol, address: str, name: str = TOY) -> Protocol:
    return replace(protocol, env=EnvSpec(name, size=16, python=address))


def rows(folder: Path) -> list[dict[str, object]]:
    lines = (folder / "episodes.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "wall_s"} for line in lines]


def play(protocol: Protocol, out: Path, **options: object) -> Result:
    return evaluate(Obedient(), protocol, out, **({"workers": 1, "videos": 0} | options))  # type: ignore[arg-type]


def children_of(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children()


def begun(pid: int) -> list[psutil.Process]:
    """The children that run their own program: before, a child still holds its parent, which waits for it."""
    return [child for child in children_of(pid) if any("worker" in word for word in child.cmdline())]


def test_episodes_films_and_hash_are_those_of_this_machine(
    protocol: Make, address: str, tmp_path: Path
) -> None:
    here = protocol(trials=2)
    play(here, tmp_path / "here", videos=1)
    play(there(here, address), tmp_path / "there", videos=1, workers=2)
    assert rows(tmp_path / "there") == rows(tmp_path / "here")
    films = sorted((tmp_path / "here/videos").iterdir())
    assert films
    for film in films:
        assert film.read_bytes() == (tmp_path / "there/videos" / film.name).read_bytes()
    assert there(here, address).hashes() == here.hashes(), "where it is played decides no result"


def test_crashes_hangs_and_bad_values_there_are_errors_of_their_episodes(
    protocol: Make, address: str, tmp_path: Path
) -> None:
    hard = there(protocol("left", *FAULTS, trials=2), address)
    got = play(hard, tmp_path / "out", timeout_s=1.0, workers=2)
    require_errors_of_their_tasks(got)


def test_a_process_whose_caller_has_gone_is_killed_even_in_a_step_that_never_ends(
    server: subprocess.Popen[str], address: str
) -> None:
    wait_until(lambda: not children_of(server.pid))  # those of earlier tests
    name, port = address.removeprefix("tcp://").split(":")
    with socket.create_connection((name, int(port)), 10):
        wait_until(lambda: bool(begun(server.pid)))
        begun(server.pid)[0].suspend()  # and now it can do nothing at all
    wait_until(lambda: not children_of(server.pid))


def test_the_processors_and_memory_of_the_other_machine_decide_how_many_processes_start(
    server: subprocess.Popen[str],
    address: str,
    protocol: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host, "cores", lambda: 1)  # here; the other machine says what it has
    started = []
    at_once = evaluate(
        Obedient(),
        there(protocol("left", trials=4), address),
        tmp_path / "out",
        videos=0,
        progress=lambda *_: started.append(len(children_of(server.pid))),
    )
    assert at_once.overall.errors == 0
    assert max(started) == min(4, len(os.sched_getaffinity(server.pid)))


def test_an_evaluation_whose_other_machine_goes_keeps_its_episodes_and_is_resumed(
    protocol: Make, tmp_path: Path
) -> None:
    whole = protocol("left", trials=4)
    play(whole, tmp_path / "here")
    with serving() as server:
        far = there(whole, address_of(server))

        def leave(done: int, total: int, record: object) -> None:
            if done == 2:
                server.terminate()
                server.wait()

        with pytest.raises(SimulationError, match="nothing answers at tcp://"):
            play(far, tmp_path / "out", progress=leave)
    assert len(rows(tmp_path / "out")) >= 2
    with serving() as server:
        play(there(whole, address_of(server)), tmp_path / "out", resume=True, retry_errors=True)
    assert rows(tmp_path / "out") == rows(tmp_path / "here")


def answering(*answers: bytes) -> Iterator[str]:
    """Listen, and answer the first connection with some bytes, each a message."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with Connection(connection.detach()) as link:
                for one in answers:
                    link.send_bytes(one)

        threading.Thread(target=answer, daemon=True).start()
        yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"


def closed() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    yield f"tcp://127.0.0.1:{port}"


WRONG: dict[str, tuple[Callable[[], Iterator[str]], str]] = {
    "nobody": (closed, "nothing answers at tcp://127.0.0.1:"),
    "no port": (lambda: iter(["tcp://here"]), "write tcp://HOST:PORT"),
    "port 0": (lambda: iter(["tcp://here:0"]), "write tcp://HOST:PORT"),
    "another scheme": (lambda: iter(["ws://here:7000"]), "write tcp://HOST:PORT"),
    "closes": (answering, "it closed the connection"),
    "another program": (lambda: answering(b"220 ready"), "is no vlafit.envs.host"),
    "another message": (lambda: answering(encode(Start(EnvSpec("x")))), "is no vlafit.envs.host"),
    "another version": (lambda: answering(encode(Hello("0" * 64, 1, 1))), "is of another version"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_address_is_named_before_the_first_episode_and_leaves_nothing(
    kind: str, protocol: Make, tmp_path: Path
) -> None:
    listen, fact = WRONG[kind]
    addresses = listen()
    with pytest.raises(SimulationError, match=r"env\.python") as caught:
        play(there(protocol("left", trials=1), next(addresses)), tmp_path / "out")
    assert fact in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_module_that_is_missing_there_is_named_with_the_address(
    protocol: Make, address: str, tmp_path: Path
) -> None:
    with pytest.raises(SimulationError) as caught:
        play(there(protocol("left", trials=1), address, "no_such_module"), tmp_path / "out")
    assert address in str(caught.value) and "no_such_module" in str(caught.value)


def test_a_port_that_is_taken_is_one_sentence(address: str) -> None:
    port = address.rpartition(":")[2]
    command = [sys.executable, "-m", "vlafit.envs.host", "--port", port]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1
    assert (
        ended.stderr.startswith(f"cannot listen on 127.0.0.1, port {port}: ")
        and ended.stderr.count("\n") == 1
    )
