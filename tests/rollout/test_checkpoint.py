"""Evaluating a checkpoint's folder: the whole way from weights to a scored table."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.rollout.toy_env import SENTENCES, robot
from vlafit import checkpoints
from vlafit.actor import load_actor
from vlafit.codec import Codec, CodecConfig, train_word_tokenizer
from vlafit.errors import ConfigError, EmbodimentError
from vlafit.policies import pi0
from vlafit.rollout import Protocol, evaluate
from vlafit.types import Embodiment

Make = Callable[..., Protocol]


def save_checkpoint(folder: Path, embodiment: Embodiment) -> Path:
    size = dataclasses.replace(pi0.SIZES["pi0-tiny"], state_dim=2, action_dim=2, max_tokens=24)
    tokenizer = train_word_tokenizer(list(SENTENCES.values()), size.language.vocab)
    settings = CodecConfig(("front",), size.vision.image_size, 2, 2, size.chunk, max_tokens=size.max_tokens)
    spread = np.random.default_rng(0).normal(size=(64, 2))
    codec = Codec.fit(settings, embodiment, spread, spread, tokenizer)
    checkpoints.save(pi0.build(size, "cpu"), folder, codec)
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "checkpoint", robot())


def test_a_checkpoint_is_scored_the_same_however_many_environments_there_are(
    checkpoint: Path, protocol: Make, tmp_path: Path
) -> None:
    for workers in (1, 3):
        out = tmp_path / str(workers)
        got = evaluate(load_actor(checkpoint, steps=3, width=4), protocol(), out, workers=workers, videos=4)
        assert got.overall.episodes == 8 and not got.notices
    films = [sorted((tmp_path / str(workers) / "videos").glob("*.mp4")) for workers in (1, 3)]
    assert len(films[0]) == 8
    for one, other in zip(*films, strict=True):
        assert one.name == other.name and one.read_bytes() == other.read_bytes()  # every step is the same
    result = json.loads((tmp_path / "1" / "result.json").read_text())
    assert result["actor"].startswith(f"checkpoint sha256:{checkpoints.digest(checkpoint)}")


def test_another_sampler_is_another_evaluation(checkpoint: Path, protocol: Make, tmp_path: Path) -> None:
    evaluate(load_actor(checkpoint, steps=2), protocol(), tmp_path / "eval", workers=1, videos=0, trials=1)
    with pytest.raises(ConfigError, match=r"steps=2 .* there.*steps=3 .* here"):
        evaluate(
            load_actor(checkpoint, steps=3), protocol(), tmp_path / "eval", workers=1, videos=0, trials=1
        )


def test_a_checkpoint_of_another_robot_is_refused(protocol: Make, tmp_path: Path) -> None:
    other = dataclasses.replace(robot(), control="absolute_position", hz=20.0)
    folder = save_checkpoint(tmp_path / "checkpoint", other)
    with pytest.raises(EmbodimentError, match=r"(?s)the policy.*protocol 'toy'.*control mode.*rate in Hz"):
        evaluate(load_actor(folder), protocol(), tmp_path / "eval", workers=1)


@pytest.mark.parametrize("device", ["gpu", "cuda:999", "meta"])
def test_a_device_that_is_not_there_is_refused(checkpoint: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=f"device '{device}' cannot be used here"):
        load_actor(checkpoint, device=device)


def test_a_checkpoint_that_is_not_there_is_refused(protocol: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no checkpoint"):
        evaluate(load_actor(tmp_path / "nothing"), protocol(), tmp_path / "eval")
