"""Every argument of the robot's loop, the client and the server is checked where it enters.

A value of the wrong type, beyond the range or not finite is a VlafitError that names the argument, the value
and what is allowed; what is accepted is listed here.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

import vlafit
from tests.serve.robots import CHUNK, ROBOT, Continuing, Summing, described, seen
from vlafit.errors import ConfigError, EmbodimentError, VlafitError
from vlafit.execution import Execution, Limits
from vlafit.observations import short
from vlafit.offline import Settings
from vlafit.requests import Expected
from vlafit.serve.client import RemoteActor, connect
from vlafit.serve.control import Controller
from vlafit.serve.options import Options
from vlafit.serve.server import serving
from vlafit.types import Guidance

NAN, INF, FAR = float("nan"), float("inf"), 10**30
VALUES: list[Any] = [None, "x", "", "1", 5, 0, -1, 1.5, NAN, INF, True, [], {}, b"x", object(), ("a",), FAR]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(Summing(), described(Summing()), Options(port=0)) as running:
        yield running.address


def start(**values: Any) -> None:
    with Controller(Summing()) as control:
        control.start(**{"instruction": "pick", **values})


def step(**values: Any) -> None:
    with Controller(Summing()) as control:
        control.start("pick")
        control.step(**{"images": seen().images, "state": seen().state, **values})


def limits(**values: Any) -> Limits:
    return Limits(**{"low": [0.0], "high": [1.0], "change": [1.0], **values})


def controller(**values: Any) -> None:
    Controller(**{"actor": Summing(), **values}).close()


def guidance(**values: Any) -> Execution:
    return Execution("real_time", guidance=Guidance(**values))


WORDS, NUMBERS, NOTHING = ["x", "1"], [5, 0, 1.5], [None]
# what is called: its signature, and for each argument the values of VALUES that it takes
CALLS: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, list[Any]]]] = {
    "Execution": (
        Execution,
        Execution,
        {"mode": [], "replan": [5], "delay": [5, 0], "decay": [*NUMBERS, -1], "guidance": []},
    ),
    "Guidance": (
        guidance,
        Guidance,
        {"schedule": [], "max_weight": [5, 1.5], "jacobian": [True], "prefix": []},
    ),
    "Limits": (
        limits,
        Limits,
        {"low": [], "high": [], "change": [], "labels": [[], ("a",)], "on_violation": []},
    ),
    "Limits.of": (
        lambda **values: Limits.of(**{"embodiment": ROBOT, **values}),
        Limits.of,
        {"embodiment": [], "on_violation": [], "change": [*NUMBERS, INF, None, 10**30]},
    ),
    "Controller": (
        controller,
        Controller,
        {
            "actor": [],
            "execution": [],
            "limits": NOTHING,
            "background": [True],
            "on_invalid": [],
            "embodiment": NOTHING,
        },
    ),
    "start": (
        start,
        partial(Controller.start, None),  # type: ignore[arg-type]
        {"instruction": WORDS, "task": [*WORDS, ""], "seed": [5, 0, None]},
    ),
    "step": (step, partial(Controller.step, None), {"images": [{}], "state": []}),  # type: ignore[arg-type]
    "Options": (
        lambda **values: Options(**{"token": "k" * 16, **values}),
        Options,
        {
            "host": WORDS,
            "port": [5, 0],
            "token": [*WORDS, ""],
            "max_clients": [5],
            "max_frame": [],
            "max_rate": [5, 1.5],
            "timeout_s": [5, 1.5],
            "names": [{}],
            "resize": [True],
            "execution": NOTHING,
        },
    ),
    "Settings": (
        Settings,
        Settings,
        {"samples": [5], "draws": [5], "seed": [5, 0], "inputs": [True], "strips": [5, 0]},
    ),
}
LOADED = {  # values that are refused before a checkpoint is opened; others would open it
    "path": [*WORDS, ()],
    "steps": [5, 0],
    "width": [5],
    "seed": [5, 0],
    "device": [*WORDS, ""],
    "dtype": [],
    "trust": [[], ("a",)],
    "base": [*WORDS, None],
    "embodiment": [*WORDS, ""],
    "compile": [True],
    "quantise": [*WORDS, ""],
    "config": [{}, None],
    "tokenizer": [*WORDS, None],
    "assets": [*WORDS, None],
    "cameras": [{}, None],
    "frame_size": [5, 0],
}


def is_one_of(value: Any, values: list[Any]) -> bool:
    return any(type(one) is type(value) and one == value for one in values)


def refuse(call: Callable[..., Any], name: str, value: Any) -> None:
    """Assert that the value is refused by the argument's name, and shown."""
    with pytest.raises(VlafitError, match=rf"(?s)\b{name}\b") as caught:
        call(**{name: value})
    if isinstance(value, int | float) and name not in ("token", "state"):
        assert short(value) in str(caught.value)


@pytest.mark.parametrize("what", CALLS)
def test_an_argument_that_cannot_be_is_refused_by_its_name(what: str) -> None:
    call, signature, allowed = CALLS[what]
    assert list(inspect.signature(signature).parameters) == list(allowed)
    for name, values in allowed.items():
        for value in VALUES:
            if is_one_of(value, values):
                call(**{name: value})
            else:
                refuse(call, name, value)


def test_an_argument_of_load_actor_is_refused_before_the_checkpoint_is_opened() -> None:
    assert list(inspect.signature(vlafit.load_actor).parameters) == list(LOADED)
    for name, values in LOADED.items():
        for value in VALUES:
            if not is_one_of(value, values):
                refuse(lambda **given: vlafit.load_actor(**{"path": "metaworld-base", **given}), name, value)


@pytest.mark.parametrize("what", [connect, RemoteActor])
def test_an_argument_of_the_client_is_refused_by_its_name(what: Callable[..., Any], address: str) -> None:
    allowed = {"url": [], "token": [*WORDS, ""], "timeout_s": [5, 1.5]}
    allowed |= {"wait_s": NUMBERS} if what is connect else {}
    assert list(inspect.signature(what).parameters) == list(allowed)
    for name, values in allowed.items():
        for value in VALUES:
            if is_one_of(value, values):
                what(**{"url": address, name: value}).close()
            else:
                refuse(lambda **given: what(**{"url": address, **given}), name, value)


def test_numbers_of_numpy_are_taken_as_pythons() -> None:
    execution = Execution(
        replan=np.int64(3),  # type: ignore[arg-type]
        decay=np.float32(0.5),  # type: ignore[arg-type]
        guidance=Guidance(max_weight=np.float64(2), jacobian=np.bool_(False)),  # type: ignore[arg-type]
    )
    assert execution == Execution(replan=3, decay=0.5, guidance=Guidance(max_weight=2.0, jacobian=False))
    assert type(execution.replan) is int and type(execution.guidance.max_weight) is float
    with Controller(Summing()) as control:
        control.start("pick", seed=np.uint64(2**64 - 1))  # type: ignore[arg-type]
        assert control._key.seed == 2**64 - 1
        with pytest.raises(ConfigError, match=r"seed must be a whole number from 0 to 2\*\*64 - 1"):
            control.start("pick", seed=2**64)


def test_an_episode_that_cannot_begin_leaves_the_one_before_as_it_is() -> None:
    answers = []
    for wrong in ({}, {"seed": -1}, {"task": 5}, {"instruction": " "}):
        with Controller(Summing(), Execution(replan=2)) as control:
            control.start("pick", seed=3)
            got = [control.step(seen(i).images, seen(i).state).tobytes() for i in range(3)]
            if wrong:
                with pytest.raises(ConfigError):
                    control.start(**{"instruction": "place", **wrong})  # type: ignore[arg-type]
            answers.append([*got, control.step(seen(3).images, seen(3).state).tobytes()])
    assert answers[1:] == answers[:1] * 3


def test_a_policy_that_reads_no_instruction_needs_none() -> None:
    class Silent(Summing):
        expected = Expected(ROBOT, instructed=False)

    for instruction in (None, ""):
        with Controller(Silent()) as control:
            control.start(instruction)
            assert control.step(seen().images, seen().state).shape == (3,)
    with Controller(Silent()) as control, pytest.raises(ConfigError, match="instruction: .* not 5"):
        control.start(5)  # type: ignore[arg-type]


class Long(Continuing):
    chunk = CHUNK


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("mode", ["chunk", "ensemble", "real_time"])
def test_a_chunk_must_last_until_the_delayed_one_is_there(mode: Any, background: bool) -> None:
    with pytest.raises(ConfigError, match=rf"a chunk has {CHUNK} steps.* at most {CHUNK - 2} steps"):
        Controller(Long(), Execution(mode, replan=CHUNK - 1, delay=2), background=background)
    with Controller(Long(), Execution(mode, replan=CHUNK - 2, delay=2), background=background) as control:
        control.start("pick")
        for i in range(3 * CHUNK):
            control.step(seen(i).images, seen(i).state)


def test_limits_are_of_the_robots_dimensions() -> None:
    with pytest.raises(ConfigError, match="limits are of 2 dimensions, .* 'arm' have 3"):
        Controller(Summing(), limits=Limits(np.zeros(2), np.ones(2), np.ones(2)))
    with pytest.raises(ConfigError, match="labels has 1 names for 2 dimensions"):
        Limits(np.zeros(2), np.ones(2), np.ones(2), labels=("a",))
    with pytest.raises(ConfigError, match="labels must be a list of texts, not 'ab'"):
        Limits(np.zeros(2), np.ones(2), np.ones(2), labels="ab")  # type: ignore[arg-type]


def test_an_embodiment_that_is_given_is_that_of_the_actor() -> None:
    other = dataclasses.replace(ROBOT, hz=20.0)
    with pytest.raises(EmbodimentError, match=r"rate in Hz: 20\.0 here, 10\.0 there"):
        Controller(Summing(), embodiment=other)


@pytest.mark.parametrize("call", [vlafit.load_checkpoint, vlafit.load_policy, vlafit.open_dataset])
def test_a_path_that_is_none_is_refused(call: Callable[..., Any]) -> None:
    for value in (None, 5, b"x"):
        with pytest.raises(ConfigError, match="(checkpoint|card) must be a path, or a name"):
            call(value)


def test_the_rounding_of_a_limit_is_shown_as_zero() -> None:
    assert 0 < float(np.float32(0.05)) - 0.05 < 1e-8
    limit = Limits(np.full(1, -1.0), np.ones(1), np.full(1, 0.05), on_violation="stop")
    with pytest.raises(EmbodimentError, match=r"dimension 0 -0\.1501, permitted from 0 to 0\.1$"):
        limit.apply(np.float32([-0.1501]), np.float32([0.05]))
    with pytest.raises(EmbodimentError, match=r"dimension 0 0\.0500001, permitted from -0\.05 to 0\.05$"):
        limit.apply(np.float32([0.0500001]), np.zeros(1, np.float32))


def test_the_embodiment_of_a_call_is_a_text() -> None:
    actor = vlafit.load_actor("metaworld-base", steps=1)
    for wrong in (None, 5, 1.5, [], b"x"):
        with pytest.raises(ConfigError, match="embodiment must be a text, not"):
            actor.of(wrong)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="embodiment must be a text, not"):
            actor.act([], [], wrong)  # type: ignore[arg-type]
