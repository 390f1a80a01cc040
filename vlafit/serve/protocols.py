"""The three protocols of one port: openpi's, vla-eval's and our own, told apart by each frame.

Our own frame asks for several observations at once, each with the key of its episode, so that a remote policy
acts as a local one. openpi's and vla-eval's frames hold one observation and no key; theirs is counted per
connection.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from vlafit import config
from vlafit.errors import ConfigError, EmbodimentError
from vlafit.execution import executable
from vlafit.observations import listed_unknown, observation
from vlafit.requests import Request, checked_key, checked_left, checked_past
from vlafit.serve import wire
from vlafit.serve.metadata import Described
from vlafit.serve.wire import WireError
from vlafit.types import ActionChunk, Committed, EpisodeKey, Feature, Guidance, Observation

Fit = Callable[[Feature, Any], Any]
"""Makes the pixels that a client sent for a camera those of the robot's."""
Name = Literal["vlafit", "openpi", "vla-eval"]

ACT = "vlafit.act"  # the type of our own frames
MAX_OBSERVATIONS = 256  # in one frame
CALLS_A_FRAME = 8  # of the policy: a slow one, asked for much, must answer before the time-out
OF_ARRAY, OF_REQUEST = 128, 1024  # bytes of a frame beside the numbers: names, types and shapes
VLA_EVAL = ("hello", "observation", "episode_start", "episode_end", "error")
STATES = ("state", "states")  # vla-eval's names of the state: its convention, and its LIBERO benchmark's


# ---------------------------------------------------------------------------------------------------- our own


def pack_requests(requests: Sequence[Request], cameras: Sequence[str]) -> bytes:
    """Encode requests as our own frame. A camera of `cameras` that an observation lacks is said to be
    missing."""
    return wire.pack({"type": ACT, "observations": [_values(request, cameras) for request in requests]})


def in_frames(requests: Sequence[Request], described: Described) -> Iterator[Sequence[Request]]:
    """Yield the requests in groups whose frames the server reads, and answers in a few calls, in order.

    A request that is too large by itself is a group of its own.
    """
    begin, size, most_bytes = 0, 0, described.max_frame
    most = min(MAX_OBSERVATIONS, CALLS_A_FRAME * max(1, described.width))
    for i, request in enumerate(requests):
        own = _bytes_of(request)
        if i > begin and (i - begin == most or 0 < most_bytes < size + own):
            yield requests[begin:i]
            begin, size = i, 0
        size += own
    if begin < len(requests):
        yield requests[begin:]


def _bytes_of(request: Request) -> int:
    """Return about how many bytes a request takes in a frame, and rather too many."""
    steps = (request.observation, *request.observation.past)
    arrays = [array for step in steps for array in (*step.images.values(), step.state)]
    if request.committed is not None:
        arrays.append(request.committed.actions)
    words = len(request.observation.instruction.encode()) + len(request.key.task.encode())
    return sum(array.nbytes + OF_ARRAY for array in arrays) + words + OF_REQUEST


def _values(request: Request, cameras: Sequence[str]) -> dict[str, Any]:
    seen, key, committed = request.observation, request.key, request.committed
    return {
        "images": dict.fromkeys(cameras) | dict(seen.images),
        "state": seen.state,
        "prompt": seen.instruction,
        **({"past": [_earlier(step, cameras) for step in seen.past]} if seen.past else {}),
        "key": [key.seed, key.task, key.replan],
        "committed": None
        if committed is None
        else {
            "actions": committed.actions,
            "delay": committed.delay,
            "end": committed.end,
            "guidance": dataclasses.asdict(committed.guidance),
        },
    }


def _earlier(seen: Observation, cameras: Sequence[str]) -> dict[str, Any]:
    return {"images": dict.fromkeys(cameras) | dict(seen.images), "state": seen.state}


def read_requests(frame: Mapping[Any, Any], described: Described) -> list[Request]:
    """Read our own frame. Raises VlafitError that names the observation and everything wrong with it."""
    values = frame.get("observations")
    if not isinstance(values, list) or not 1 <= len(values) <= MAX_OBSERVATIONS:
        raise WireError(f"observations: must be a list of 1 to {MAX_OBSERVATIONS}, not {_kind(values)}")
    requests = []
    for i, one in enumerate(values):
        needed = {"images", "state", "prompt", "key", "committed"}
        if not isinstance(one, Mapping) or set(one) - {"past"} != needed:
            raise WireError(
                f"observation {i}: must hold images, state, prompt, key and committed, and may hold past"
            )
        where = f"observation {i}"
        try:
            seen = _observation(one["images"], one["state"], one["prompt"], described)
            steps = one.get("past", ())
            if isinstance(steps, list):
                steps = [_past(step, seen.instruction, described) for step in steps[: described.history]]
            past = checked_past(steps, seen.instruction, described.expected)
        except EmbodimentError as error:
            raise EmbodimentError(f"{where}: {error}") from None
        key, left = _key(one["key"], where), _committed(one["committed"], where)
        requests.append(
            Request(
                dataclasses.replace(seen, past=past),
                checked_key(key, where),
                checked_left(left, described.expected, where),
            )
        )
    return requests


def as_sent(camera: Feature, pixels: Any) -> Any:
    """Return the pixels."""
    return pixels


def _observation(
    images: Any, state: Any, prompt: Any, described: Described, fit: Fit = as_sent
) -> Observation:
    if fit is not as_sent and isinstance(images, Mapping):
        cameras = {camera.name: camera for camera in described.embodiment.cameras}
        images = {n: fit(cameras[n], pixels) if n in cameras else pixels for n, pixels in images.items()}
    return observation(
        images,
        state,
        prompt,
        described.embodiment,
        required=described.required,
        instructed=described.instructed,
    )


def _past(step: Any, prompt: str, described: Described) -> Observation:
    """Read one of the earlier observations of a frame."""
    if not isinstance(step, Mapping) or set(step) != {"images", "state"}:
        raise EmbodimentError("past: each must hold images and state")
    try:
        return _observation(step["images"], step["state"], prompt, described)
    except EmbodimentError as error:
        raise EmbodimentError(f"past: {error}") from None


def _key(values: Any, where: str) -> EpisodeKey:
    if not isinstance(values, list) or len(values) != 3:
        raise WireError(f"{where}: key must be [seed, task, replan], not {str(values)[:80]}")
    return EpisodeKey(*values)


def _committed(values: Any, where: str) -> Committed | None:
    if values is None:
        return None
    if not isinstance(values, Mapping) or set(values) != {"actions", "delay", "end", "guidance"}:
        raise WireError(f"{where}: committed must hold actions, delay, end and guidance")
    try:
        guidance = config.build(Guidance, values["guidance"], f"{where}: committed.guidance")
    except ConfigError as error:
        raise WireError(str(error)) from error
    return Committed(values["actions"], values["delay"], values["end"], guidance)


def pack_chunks(chunks: Sequence[ActionChunk], warnings: Sequence[str] = ()) -> bytes:
    """Encode the answer to our own frame, with sentences about what is unusual in the request."""
    answer: dict[str, Any] = {"type": "vlafit.chunks", "chunks": [chunk.actions for chunk in chunks]}
    if any(chunk.valid is not None for chunk in chunks):
        answer["valid"] = [chunk.valid for chunk in chunks]
    return wire.pack(answer | ({"warnings": list(warnings)} if warnings else {}))


def read_warnings(frame: Any) -> list[str]:
    """Return the sentences in the answer to our own frame about what is unusual in the request."""
    warnings = frame.get("warnings") if isinstance(frame, Mapping) else None
    return [str(text) for text in warnings] if isinstance(warnings, list) else []


def read_chunks(frame: Any, count: int, dimensions: int) -> list[ActionChunk]:
    """Read the answer to our own frame. Raises WireError unless it holds `count` chunks that a robot may be
    sent."""
    chunks = frame.get("chunks") if isinstance(frame, Mapping) else None
    if (
        not isinstance(chunks, list)
        or len(chunks) != count
        or not all(isinstance(c, np.ndarray) for c in chunks)
    ):
        raise WireError(f"the answer to {count} observations holds {_kind(chunks)}")
    valid = frame.get("valid", [None] * count)  # only of policies that answer with tokens
    if not isinstance(valid, list) or len(valid) != count or not all(v in (None, True, False) for v in valid):
        raise WireError(f"valid in the answer to {count} observations is {_kind(valid)}")
    try:
        return [
            ActionChunk(executable(chunk, dimensions), whether)
            for chunk, whether in zip(chunks, valid, strict=True)
        ]
    except EmbodimentError as error:
        raise WireError(str(error)) from None


# --------------------------------------------------------------------------------------------------------eval


def read_openpi(
    frame: Mapping[Any, Any],
    described: Described,
    names: Mapping[str, str],
    key: EpisodeKey,
    fit: Fit = as_sent,
) -> Request:
    """Read the flat or nested observation that openpi's client sends.

    Its keys are the robot's own choice: "images" (a map), "state" and "prompt", or one key a camera, each
    with or without "observation/" in front. `names` maps other keys to a camera or to "state"; several arrays
    mapped to the state are joined in the order of `names`. A key that is left over is an error, and so are
    two keys for one thing. `fit` is given each camera's pixels.
    """
    images: dict[str, Any] = {}
    states: dict[str, Any] = {}
    prompt: Any = None
    taken: dict[str, str] = {}  # what the robot calls it: the frame's key
    twice: list[str] = []
    unknown: list[str] = []
    cameras = [camera.name for camera in described.embodiment.cameras]

    def take(name: str, value: Any, where: str = "") -> None:
        nonlocal prompt
        target = names.get(name, name.removeprefix("observation/"))
        if not (target == "state" and name in names):  # those that are mapped to the state are joined
            first = taken.setdefault(target, where + name)
            if first != where + name and target in (*cameras, "state", "prompt"):
                pair = f"{first[:80]!r} and {(where + name)[:80]!r}"
                twice.append(f"{target}: the frame names it twice, by {pair}; send one of them")
        if target in cameras:
            images[target] = value
        elif target == "state":
            states[name] = value
        elif target == "prompt":
            prompt = value
        else:
            unknown.append(name)

    for name, value in frame.items():
        if name == "images" and isinstance(value, Mapping):
            for camera, pixels in value.items():
                take(str(camera), pixels, "images/")
        else:
            take(str(name), value)
    if twice:
        listed = "\n  ".join(twice[:8])
        robot = described.embodiment.name
        raise EmbodimentError(f"the observation is not one of the robot {robot!r}:\n  {listed}")
    problem = ""
    try:
        seen = _observation(images, _joined_state(states, names), prompt, described, fit)
        if not unknown:
            return Request(seen, dataclasses.replace(key, task=seen.instruction))
        problem = f"the observation is not one of the robot {described.embodiment.name!r}:"
    except EmbodimentError as error:
        problem = str(error)
    known = [*cameras, "state", "prompt", "images"]
    advice = "; leave it out, or map it with --map"
    lines = listed_unknown("key", "the robot has nothing of this name", unknown, known, advice)
    raise EmbodimentError("\n  ".join([problem, *lines]))


def _joined_state(states: Mapping[str, Any], names: Mapping[str, str]) -> Any:
    if len(states) < 2:
        return next(iter(states.values()), None)
    order = [name for name in names if name in states] + [name for name in states if name not in names]
    try:
        return np.concatenate([np.atleast_1d(np.asarray(states[name])) for name in order])
    except ValueError as error:
        raise EmbodimentError(f"state: {', '.join(order)} cannot be joined: {error}") from error


def pack_openpi(chunk: ActionChunk, milliseconds: float, warnings: Sequence[str] = ()) -> bytes:
    """Encode the answer to openpi's client: actions [t, a] and the time that it took.

    Sentences about what is unusual are a key of their own, only where there are any; so is `valid` of a
    policy that answers with tokens.
    """
    answer: dict[str, Any] = {"actions": chunk.actions, "server_timing": {"infer_ms": milliseconds}}
    if chunk.valid is not None:
        answer["valid"] = chunk.valid
    return wire.pack(answer | ({"warnings": list(warnings)} if warnings else {}))


def read_vla_eval(
    payload: Mapping[Any, Any],
    described: Described,
    names: Mapping[str, str],
    key: EpisodeKey,
    fit: Fit = as_sent,
) -> Request:
    """Read an observation of vla-eval: images, task_description, state. What else it holds is for other
    models. `fit` is given each camera's pixels."""
    images = payload.get("images")
    if not isinstance(images, Mapping):
        raise WireError(f"images: must be a map of cameras, not {_kind(images)}")
    cameras = {camera.name for camera in described.embodiment.cameras}
    named = {names.get(str(name), str(name)): pixels for name, pixels in images.items()}
    seen = _observation(
        {name: pixels for name, pixels in named.items() if name in cameras},
        next((payload[name] for name in STATES if name in payload), None),
        payload.get("task_description"),
        described,
        fit,
    )
    return Request(seen, key)


def episode_of(payload: Mapping[Any, Any], count: int) -> EpisodeKey:
    """Return the key of vla-eval's episode: its task's name and index, or `count` where it has no index."""
    task = payload.get("task")
    values = task if isinstance(task, Mapping) else {}
    index = values.get("episode_idx")
    return EpisodeKey(
        index if type(index) is int and index >= 0 else count, str(values.get("name", ""))[:1000], 0
    )


def pack_vla_eval(kind: Literal["action", "error"], payload: Mapping[str, Any], seq: int) -> bytes:
    """Encode a message to vla-eval."""
    message = {"type": kind, "payload": dict(payload), "seq": seq, "timestamp": 0.0}
    return wire.pack(message, text_keys=True)


def protocol_of(frame: Any) -> Name:
    """Tell by its keys which protocol a frame is of. Raises WireError where it is no map."""
    if not isinstance(frame, Mapping):
        raise WireError(f"a frame must hold a map, not {_kind(frame)}")
    kind = frame.get("type")
    if not isinstance(kind, str):
        return "openpi"
    if kind == ACT:
        return "vlafit"
    if kind in VLA_EVAL and isinstance(frame.get("payload"), Mapping) and type(frame.get("seq")) is int:
        return "vla-eval"
    return "openpi"


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array {value.dtype} {value.shape}"
    return f"{len(value)} values" if isinstance(value, list) else type(value).__name__
