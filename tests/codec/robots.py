"""A small robot, its statistics and a tokenizer, for tests of the codec."""

import functools

import numpy as np

from vlafit.codec import Codec, CodecConfig, Tokenizer, train_word_tokenizer
from vlafit.codec.prompts import FORMS
from vlafit.types import Embodiment, Feature, Observation, Sample

SENTENCES = ("open the faucet", "close the faucet")

ROBOT = Embodiment(
    name="arm",
    cameras=(Feature("front", (12, 16, 3)), Feature("wrist", (8, 8, 3))),
    state=Feature("state", (3,), "m", ("x", "y", "z")),
    action=Feature("action", (2,), "m", ("x", "y")),
    hz=20.0,
    control="position",
    renderer="ray",
)


def config(**changes: object) -> CodecConfig:
    values: dict[str, object] = {
        "cameras": ("wrist", "", "front"),
        "image_size": 8,
        "state_dim": 5,
        "action_dim": 4,
        "chunk": 3,
        "max_tokens": 40,
    }
    return CodecConfig(**(values | changes))  # type: ignore[arg-type]


@functools.cache
def tokenizer() -> Tokenizer:
    """Trained once; a Tokenizer never changes."""
    return train_word_tokenizer([*SENTENCES, *FORMS["pi05"].vocabulary], 700)


def codec(rng: np.random.Generator, **changes: object) -> Codec:
    states = rng.normal(size=(50, 3)) * [0.1, 2.0, 30.0] + [5.0, 0.0, -7.0]
    actions = rng.normal(size=(60, 2)) * [0.3, 4.0]
    return Codec.fit(config(**changes), ROBOT, states, actions, tokenizer())


def observation(rng: np.random.Generator, instruction: str = SENTENCES[0]) -> Observation:
    images = {c.name: rng.integers(0, 256, c.shape, dtype=np.uint8) for c in ROBOT.cameras}
    return Observation(images, rng.normal(size=3).astype(np.float32), instruction)


def sample(rng: np.random.Generator, real: int = 2) -> Sample:
    actions = rng.normal(size=(3, 2)).astype(np.float32)
    return Sample(observation(rng), actions, np.arange(3) < real, ("set", "file/demo_0", 4))
