"""A small robot and actors for it, for tests of serving."""

import threading
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from vlafit.codec import Codec, CodecConfig, Statistics
from vlafit.codec.state_watch import StateWatch
from vlafit.errors import CodecError
from vlafit.serve.metadata import Described
from vlafit.types import ActionChunk, Committed, Embodiment, EpisodeKey, Feature, Observation

ROBOT = Embodiment(
    name="arm",
    cameras=(Feature("front", (8, 8, 3)), Feature("wrist", (8, 8, 3))),
    state=Feature("state", (3,), "rad", ("base", "elbow", "gripper")),
    action=Feature("action", (3,), "rad", ("base", "elbow", "gripper"), (-1.0, -1.0, 0.0), (1.0, 1.0, 1.0)),
    hz=10.0,
    control="absolute_position",
    renderer="camera",
)
CHUNK = 6


class Summing:
    """Acts by all that it is given: every change of pixels, state, words or key changes every action."""

    embodiment = ROBOT
    seeds: Mapping[str, Collection[int]] = {"pick": (3, 4)}

    def __init__(self, width: int = 4) -> None:
        self.width = width
        self.widths: list[int] = []
        self.open = threading.Event()  # calls wait while it is cleared
        self.open.set()
        self.asked = threading.Event()

    def fingerprint(self) -> str:
        return "summing 1"

    def act(self, observations: Sequence[Observation], keys: Sequence[EpisodeKey]) -> list[ActionChunk]:
        self.widths.append(len(keys))
        self.asked.set()
        assert self.open.wait(30)
        if any(seen.instruction == "fail" for seen in observations):
            raise RuntimeError("a bug")
        if any(seen.instruction == "too long" for seen in observations):
            raise CodecError("the prompt has too many tokens")
        return [self._act(*pair) for pair in zip(observations, keys, strict=True)]

    def _act(self, seen: Observation, key: EpisodeKey) -> ActionChunk:
        pixels = [int(image.sum()) for _, image in sorted(seen.images.items())]
        words = list((seen.instruction + key.task).encode())
        rng = np.random.default_rng([key.seed, key.replan, *pixels, *words])
        return ActionChunk(rng.normal(size=(CHUNK, 3)).astype(np.float32) + seen.state)


class Continuing(Summing):
    """The same, but it repeats what is committed and reports the delay in the last step of its chunk."""

    def act_guided(
        self,
        observations: Sequence[Observation],
        keys: Sequence[EpisodeKey],
        committed: Sequence[Committed | None],
    ) -> list[ActionChunk]:
        chunks = self.act(observations, keys)
        for chunk, left in zip(chunks, committed, strict=True):
            if left is not None:
                chunk.actions[: left.delay] = left.actions[: left.delay]
                chunk.actions[-1] = left.delay, left.end, left.guidance.max_weight
        return chunks


class Watching(Summing):
    """Knows the statistics of its states: a mean, deviation 1."""

    logs_states = True

    def __init__(self, mean: float = 0.0) -> None:
        super().__init__()
        self.mean = mean

    def state_watch(self) -> StateWatch:
        column = Statistics(9, np.full(3, self.mean), np.ones(3))
        config = CodecConfig(("front", "wrist"), 8, 3, 3, 6, prompt=None)
        return StateWatch(Codec(config, ROBOT, {"state": column, "action": column}, None))


def described(actor: Summing) -> Described:
    return Described(
        embodiment=ROBOT,
        width=actor.width,
        fingerprint=actor.fingerprint(),
        guided=isinstance(actor, Continuing),
        chunk=CHUNK,
        required=("front", "wrist"),
        seeds={"pick": (3, 4)},
    )


def seen(number: int = 0, instruction: str = "pick up the cube") -> Observation:
    rng = np.random.default_rng(number)
    images = {name: rng.integers(0, 256, (8, 8, 3), np.uint8) for name in ("front", "wrist")}
    return Observation(images, rng.normal(size=3).astype(np.float32), instruction)
