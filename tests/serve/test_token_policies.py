"""A policy that writes tokens (pi0-FAST), served: a robot is told when they make no chunk of actions.

The policy is the recorded one that was overfit to two samples: there its tokens are a chunk, elsewhere not
always.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from websockets.sync.client import connect as dial

import vlafit
from tests.checkpoints.pi0_fast_folder import TOLD, write_folder
from tests.checkpoints.test_pi0_fast import samples
from vlafit.actor import PolicyActor
from vlafit.errors import AnswerError, ConfigError
from vlafit.execution import Execution
from vlafit.serve import wire
from vlafit.serve.client import connect
from vlafit.serve.control import Controller
from vlafit.serve.describe import describe
from vlafit.serve.options import Options
from vlafit.serve.server import Running, serving
from vlafit.types import ActionChunk, EpisodeKey, Observation

NO_CHUNK = "the policy's tokens make no chunk of actions"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return vlafit.load_checkpoint(write_folder(tmp_path_factory.mktemp("fast") / "c", "overfit"), config=TOLD)


@pytest.fixture
def make(loaded: Any) -> Callable[[int], PolicyActor]:
    return lambda width: PolicyActor(loaded.policy, loaded.codec, width=width, identity="recorded")


@pytest.fixture
def serve(make: Callable[[int], PolicyActor]) -> Iterator[Callable[[int], Running]]:
    with ExitStack() as stack:

        def start(width: int = 1) -> Running:
            actor = make(width)
            options = Options(port=0, execution=Execution(replan=actor.chunk))
            return stack.enter_context(serving(actor, describe(actor), options))

        yield start


def observations() -> list[Observation]:
    """Two whose answer is a chunk, and some whose pictures are noise."""
    good = [sample.observation for sample in samples()]
    rng = np.random.default_rng(0)
    noise = {name: rng.integers(0, 256, image.shape, np.uint8) for name, image in good[0].images.items()}
    others = [
        replace(good[1], images=noise, instruction=words) for words in ("push it", "lift the cup", "turn")
    ]
    return [*good, *others]


KEYS = [EpisodeKey(i, "t", 0) for i in range(5)]


@pytest.fixture
def alone(make: Callable[[int], PolicyActor]) -> list[ActionChunk]:
    """The answers of the policy here, of which some are no chunk."""
    chunks = make(1).act(observations(), KEYS)
    assert [c.valid for c in chunks[:2]] == [True, True] and not all(c.valid for c in chunks)
    return chunks


def invalid_in(chunks: list[ActionChunk]) -> int:
    return next(i for i, chunk in enumerate(chunks) if not chunk.valid)


def test_answers_that_are_no_chunk_are_counted_once_for_a_batch(
    make: Callable[[int], PolicyActor], caplog: pytest.LogCaptureFixture
) -> None:
    actor, noisy = make(12), observations()[2:] * 4
    keys = [EpisodeKey(i, "t", 0) for i in range(len(noisy))]
    found = []
    for times in range(1, 4):
        caplog.clear()
        before = found.count(False)
        found += [chunk.valid for chunk in actor.act(noisy, keys)]
        now = found.count(False)
        counts = f"{now} of {12 * times} answers"
        said = [record.getMessage() for record in caplog.records if NO_CHUNK in record.getMessage()]
        doubled = any(before < 2**power <= now for power in range(8))
        assert [counts in one for one in said] == [True] * doubled
    assert found[:12].count(False) > 4  # so that 1, 2 and 4 were passed on the way


@pytest.mark.parametrize("width", [1, 4])
def test_several_clients_get_what_each_would_get_alone(
    make: Callable[[int], PolicyActor], serve: Callable[[int], Running], width: int
) -> None:
    expected = make(width).act(observations(), KEYS)
    running = serve(width)
    with ExitStack() as stack, ThreadPoolExecutor(5) as pool:
        remotes = [stack.enter_context(connect(running.address)) for _ in KEYS]
        calls = zip(remotes, observations(), KEYS, strict=True)
        futures = [pool.submit(remote.act, [seen], [key]) for remote, seen, key in calls]
        answers = [future.result(timeout=60)[0] for future in futures]
        assert remotes[0].expected.fate_of_invalid == make(width).fate_of_invalid != ""
    for one, other in zip(expected, answers, strict=True):
        assert one.actions.tobytes() == other.actions.tobytes() and one.valid is other.valid
    invalid = sum(not chunk.valid for chunk in expected)
    assert f'vlafit_warnings_total{{about="answer"}} {invalid}' in running.metrics.text()


def test_openpis_client_is_told_with_the_answer(
    serve: Callable[[], Running], alone: list[ActionChunk]
) -> None:
    bad = invalid_in(alone)
    with dial(serve().address, compression=None, proxy=None) as connection:
        assert "filled with zeros" in wire.unpack(connection.recv(timeout=10))["invalid_answers"]
        for number, warned in ((0, False), (bad, True), (0, False)):
            seen = observations()[number]
            images = {f"observation/{name}": image for name, image in seen.images.items()}
            connection.send(wire.pack(images | {"state": seen.state, "prompt": seen.instruction}))
            answer = wire.unpack(connection.recv(timeout=60))
            assert answer.get("valid", True) is not warned and ("warnings" in answer) is warned
            if warned:
                (sentence,) = answer["warnings"]
                assert (
                    NO_CHUNK in sentence and "1 of 2 answers" in sentence and "filled with zeros" in sentence
                )


@pytest.mark.parametrize("where", ["here", "served"])
@pytest.mark.parametrize("background", [False, True])
def test_a_robot_executes_what_stands_for_it_with_a_warning_or_stops(
    make: Callable[[int], PolicyActor],
    serve: Callable[[], Running],
    alone: list[ActionChunk],
    caplog: pytest.LogCaptureFixture,
    where: str,
    background: bool,
) -> None:
    bad = observations()[invalid_in(alone)]
    good = observations()[0]
    with ExitStack() as stack:
        actor = make(1) if where == "here" else stack.enter_context(connect(serve().address))
        with Controller(actor, Execution(replan=2), background=background) as control:
            control.start(bad.instruction)
            for _ in range(8):
                control.step(bad.images, bad.state)
            assert control.invalid_answers >= (1 if background else 4)
        lines = [r.getMessage() for r in caplog.records if r.name == "vlafit.serve.control"]
        assert NO_CHUNK in lines[0] and "1 of 1 answers" in lines[0]
        assert len(lines) <= 1 + np.log2(control.invalid_answers)  # said at the first and as it doubles
        with Controller(actor, Execution(replan=2), background=background, on_invalid="stop") as control:
            control.start(bad.instruction)
            with pytest.raises(AnswerError, match=f"stopped: {NO_CHUNK}"):
                for _ in range(8):
                    control.step(bad.images, bad.state)
            control.start(good.instruction)
            control.step(good.images, good.state)


def test_what_a_controller_does_with_it_must_be_known() -> None:
    from tests.serve.robots import Summing

    with pytest.raises(ConfigError, match="on_invalid must be one of 'execute', 'stop', not 'hold'"):
        Controller(Summing(), on_invalid="hold")  # type: ignore[arg-type]


def test_vla_evals_runner_gets_one_action_a_step_of_such_a_policy(
    serve: Callable[[], Running], alone: list[ActionChunk]
) -> None:
    seen = observations()[0]
    payload = {"images": dict(seen.images), "state": seen.state, "task_description": seen.instruction}
    with dial(serve().address, compression=None, proxy=None) as connection:
        connection.recv(timeout=10)
        begin = {"task": {"name": "t", "episode_idx": 0}}
        connection.send(wire.pack({"type": "episode_start", "payload": begin, "seq": 1, "timestamp": 0.0}))
        message = {"type": "observation", "payload": payload, "seq": 2, "timestamp": 0.0}
        got = []
        for _ in range(3):
            connection.send(wire.pack(message))
            got.append(wire.unpack(connection.recv(timeout=60))["payload"]["actions"].tobytes())
    assert got == [action.tobytes() for action in alone[0].actions[:3]]
