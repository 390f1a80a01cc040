"""Whatever is quoted in an error stays short: no message, answer or log line repeats a text of 100,000
characters."""

import logging
from collections.abc import Callable, Iterator
from threading import Thread
from typing import Any

import numpy as np
import pytest
from websockets.sync.client import connect as dial
from websockets.sync.server import ServerConnection, serve

import vlafit
from tests.rollout.test_checkpoint import save_checkpoint
from tests.rollout.toy_env import robot
from vlafit.actor import PolicyActor, load_actor
from vlafit.errors import VlafitError
from vlafit.execution import Execution, Limits
from vlafit.serve import wire
from vlafit.serve.client import RemoteActor, connect
from vlafit.serve.control import Controller
from vlafit.serve.describe import describe
from vlafit.serve.options import Options
from vlafit.serve.server import Running, serving
from vlafit.types import ActionChunk, Committed, EpisodeKey, Guidance, Observation

LONG = "X" * 100_000
LONGEST = 1500  # characters: eight names of 80 with what is wrong with each
IMAGES, STATE = {"front": np.zeros((16, 16, 3), np.uint8)}, np.zeros(2, np.float32)
GOOD = Observation(IMAGES, STATE, "go left")
KEY = EpisodeKey(0, "left", 0)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> PolicyActor:
    return load_actor(save_checkpoint(tmp_path_factory.mktemp("policy") / "c", robot()), steps=1)


@pytest.fixture(scope="module")
def running(local: PolicyActor) -> Iterator[Running]:
    with serving(local, describe(local), Options(port=0)) as running:
        yield running


@pytest.fixture(scope="module")
def remote(running: Running) -> Iterator[RemoteActor]:
    with connect(running.address) as remote:
        yield remote


def step(actor: PolicyActor | RemoteActor, words: str = "go left", **changes: Any) -> None:
    observed = {"images": IMAGES, "state": STATE, **changes}
    with Controller(actor) as control:
        control.start(words)
        control.step(**observed)


def ask(actor: PolicyActor | RemoteActor, *key: Any, **guidance: Any) -> list[ActionChunk]:
    left = Committed(np.zeros((3, 2), np.float32), 0, 1, Guidance(**guidance))
    return actor.act_guided([GOOD], [EpisodeKey(*(key or (0, "left", 0)))], [left])


Near = Callable[[PolicyActor | RemoteActor], object]
ASKED: dict[str, Near] = {
    "prompt": lambda actor: step(actor, LONG),
    "many words": lambda actor: step(actor, "go " * 30_000),
    "too long a prompt": lambda actor: step(actor, 2 * LONG),
    "a camera": lambda actor: step(actor, images={LONG: IMAGES["front"]}),
    "cameras": lambda actor: step(actor, images={f"{i}{LONG}": 0 for i in range(30)}),
    "images": lambda actor: step(actor, images=LONG),
    "pixels": lambda actor: step(actor, images={"front": LONG}),
    "state": lambda actor: step(actor, state=LONG),
    "states": lambda actor: step(actor, state=[np.nan] * 100_000),
    "seed": lambda actor: ask(actor, LONG, "left", 0),
    "digits": lambda actor: ask(actor, 10**5000, "left", 0),
    "replan": lambda actor: ask(actor, 0, "left", LONG),
    "schedule": lambda actor: ask(actor, schedule=LONG),
    "weight": lambda actor: ask(actor, max_weight=LONG),
    "execution": lambda actor: Controller(actor, LONG),  # type: ignore[arg-type]
    "limits": lambda actor: Controller(actor, limits=LONG),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("where", ["local", "remote"])
@pytest.mark.parametrize("name", ASKED)
def test_an_actor_near_or_far_quotes_little(where: str, name: str, request: pytest.FixtureRequest) -> None:
    with pytest.raises(VlafitError) as caught:
        ASKED[name](request.getfixturevalue(where))
    assert len(str(caught.value)) < LONGEST


def own(**changes: Any) -> dict[str, Any]:
    one = {"images": IMAGES, "state": STATE, "prompt": "go left", "key": [0, "a", 0], "committed": None}
    return {"type": "vlafit.act", "observations": [one | changes]}


def left(**changes: Any) -> dict[str, Any]:
    committed = {"actions": np.zeros((3, 2), np.float32), "delay": 0, "end": 1, "guidance": {}}
    return own(committed=committed | changes)


OPENPI = {"observation/front": IMAGES["front"], "observation/state": STATE, "prompt": "go left"}
FRAMES: dict[str, Any] = {
    "openpi: prompt": OPENPI | {"prompt": LONG},
    "openpi: words": OPENPI | {"prompt": "go " * 30_000},
    "openpi: key": OPENPI | {LONG: 1},
    "openpi: keys": OPENPI | {f"{i}{LONG}": 1 for i in range(50)},
    "openpi: state": OPENPI | {"observation/state": LONG},
    "openpi: pixels": OPENPI | {"observation/front": LONG},
    "type": {"type": LONG},
    "prompt": own(prompt=LONG),
    "key": own(key=[LONG, LONG, LONG]),
    "no key": own(key=LONG),
    "images": own(images={LONG: 0}),
    "past": own(past=[LONG]),
    "guidance": left(guidance={LONG: LONG}),
    "schedule": left(guidance={"schedule": LONG}),
    "weight": left(guidance={"max_weight": LONG}),
    "delay": left(delay=LONG),
    "dtype": {"prompt": {"__ndarray__": True, "data": b"1", "dtype": LONG, "shape": [LONG]}},
    "vla-eval": {
        "type": "observation", "payload": {"images": {"front": LONG}, "task_description": LONG}, "seq": 0,
    },
}  # fmt: skip


def test_a_server_quotes_little_in_its_answers_and_its_log(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG), dial(running.address, proxy=None, max_size=None) as connection:
        connection.recv(timeout=10)
        for name, frame in FRAMES.items():
            connection.send(wire.pack(frame))
            answer = connection.recv(timeout=10)
            assert len(answer) < LONGEST, name
    assert max(len(record.getMessage()) for record in caplog.records) < LONGEST


@pytest.mark.parametrize(
    "make",
    [
        lambda: Limits.of(robot(), LONG),  # type: ignore[arg-type]
        lambda: Limits.of(robot(), change=LONG),  # type: ignore[arg-type]
        lambda: Limits([LONG], [0], [0]),  # type: ignore[arg-type]
        lambda: Execution(LONG),  # type: ignore[arg-type]
        lambda: Execution(replan=LONG),  # type: ignore[arg-type]
        lambda: Execution(replan=10**5000),
        lambda: Options(host=LONG),
        lambda: robot().camera(LONG),
        lambda: vlafit.connect(LONG),
        lambda: vlafit.connect(f"ws://{LONG}"),
        lambda: vlafit.connect(f"ws://127.0.0.1:9/{LONG}"),
        lambda: vlafit.load_actor(LONG),
        lambda: vlafit.load_actor("metaworld-base", embodiment=LONG),
        lambda: vlafit.load_actor("metaworld-base", device=LONG),
        lambda: vlafit.load_actor("metaworld-base", dtype=LONG),
        lambda: vlafit.open_dataset(LONG),
    ],
)
def test_what_is_made_of_a_long_text_is_refused_in_a_short_one(make: Callable[[], object]) -> None:
    with pytest.raises(VlafitError) as caught:
        make()
    assert len(str(caught.value)) < LONGEST


def test_another_server_that_greets_with_a_novel_is_quoted_in_part() -> None:
    def greet(connection: ServerConnection) -> None:
        connection.send("X\n" * 10**6)
        connection.recv()

    with serve(greet, "127.0.0.1", 0) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(VlafitError) as caught:
            connect(f"ws://127.0.0.1:{server.socket.getsockname()[1]}")
    assert "X" in str(caught.value) and len(str(caught.value)) < 5000
