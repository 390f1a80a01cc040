"""Messages of environment processes: what is sent arrives, and nothing else is built."""

import dataclasses
import math
import pickle

import msgpack
import numpy as np
import pytest

from tests.rollout.toy_env import robot
from vlafit.envs import EnvSpec, Perturbation
from vlafit.envs.messages import COMMANDS, REPLIES, Failed, Moved, Play, Ready, Reset, Start, Unplayable
from vlafit.envs.wire import ARRAY, WireError, decode, encode
from vlafit.types import Observation

RNG = np.random.default_rng(0)
SEEN = Observation(
    {"front": RNG.integers(0, 255, (4, 6, 3)).astype(np.uint8)[::-1]},  # not contiguous
    RNG.normal(size=3).astype(np.float32),
    "zieh die Schublade auf",
    {"goal": RNG.normal(size=(2, 2)), "held": np.array(True), "empty": np.zeros((0, 3), ">i4")},
)
MESSAGES = (
    Start(EnvSpec("toy", 32, "egl", ("a", "b"), perturb=Perturbation(camera_m=0.1)), ("left", 3), math.inf),
    Start(EnvSpec("toy")),
    Reset(1, "left", 2**63 - 1, 5, (0.0, 1.5), 0, True, False),
    Play(0, RNG.normal(size=(8, 4)).astype(np.float32), True, False, 2),
    Ready(robot(), {"toy": "1"}, {"left": "go left"}, 2**40, 0, True),
    Moved(3, SEEN, (SEEN,), 8, True, False, (SEEN.images["front"],)),
    Failed("Traceback ..."),
    Unplayable("no"),
    Start(EnvSpec("toy"), None, 1.0, {"left": (45, 10)}),
    Ready(robot(), {"toy": "1"}, {"left": "go left"}, 2**40, 0, False, ("there is no start 50",)),
)


def equal(first: object, second: object) -> bool:
    if isinstance(first, np.ndarray):
        same = isinstance(second, np.ndarray) and first.dtype == second.dtype and first.shape == second.shape
        return same and first.tobytes() == second.tobytes()
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in dataclasses.fields(first)]
        return type(first) is type(second) and all(
            equal(getattr(first, n), getattr(second, n)) for n in names
        )
    if hasattr(first, "keys"):
        return first.keys() == second.keys() and all(equal(first[k], second[k]) for k in first)  # type: ignore
    if isinstance(first, tuple):
        return len(first) == len(second) and all(map(equal, first, second))  # type: ignore[arg-type]
    return type(first) is type(second) and first == second


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_what_is_sent_arrives_with_its_types_and_bits(message: object) -> None:
    got = decode(encode(message), (*COMMANDS, *REPLIES))
    assert equal(message, got)


def test_arrays_that_arrive_can_be_written_to() -> None:
    got = decode(encode(MESSAGES[5]), REPLIES)
    assert isinstance(got, Moved) and got.observation.state.flags.writeable


@pytest.mark.parametrize("state", [np.array(["a"]), np.array([object()]), np.array([1j])])
def test_only_numbers_are_sent(state: np.ndarray) -> None:
    moved = Moved(0, dataclasses.replace(SEEN, state=state), (), 0, False, False, ())
    with pytest.raises(WireError, match=r"Moved\.observation\.state: an array of"):
        encode(moved)


def wrong(**fields: object) -> bytes:
    read = msgpack.unpackb(encode(MESSAGES[5]))
    return msgpack.packb([read[0], read[1] | fields])


def frame(dtype: str, length: int) -> bytes:
    return wrong(frames=[{ARRAY: dtype, "shape": [length], "data": b"12345678"}])


BAD = {
    "a pickle": (pickle.dumps(Failed("x")), "is not msgpack|must be one of"),
    "nothing": (b"", "is not msgpack"),
    "a command": (encode(MESSAGES[2]), "must be one of Ready, Moved, Failed, Unplayable"),
    "a field more": (wrong(also=1), "needs slot, observation"),
    "success as a number": (wrong(success=1), r"Moved\.success: must be bool, is 1"),
    "steps as a bool": (wrong(steps=True), r"Moved\.steps: must be int, is True"),
    "an array of objects": (frame("|O", 1), r"Moved\.frames\[0\]: is not an array"),
    "an array too short": (frame("|u1", 9), r"Moved\.frames\[0\]: is not an array"),
    "a shape below 0": (frame("|u1", -1), r"Moved\.frames\[0\]: is not an array"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_message_is_refused_by_name(kind: str) -> None:
    data, fact = BAD[kind]
    with pytest.raises(WireError, match=fact):
        decode(data, REPLIES)


def test_an_integer_of_more_than_64_bits_is_refused_where_it_is_sent() -> None:
    with pytest.raises(WireError, match="Reset cannot be sent"):
        encode(dataclasses.replace(MESSAGES[2], seed=2**64))  # type: ignore[type-var]
