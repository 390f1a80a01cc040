"""A small OpenVLA: a run needs no action tokenizer, validates decoded actions, and an actor executes them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.train.world import losses, metrics, tiny
from vlafit.actor import load_actor
from vlafit.codec.action_bins import BINS
from vlafit.errors import ConfigError
from vlafit.train import run
from vlafit.train.experiment import build
from vlafit.types import EpisodeKey, Observation

POLICY = {"family": "openvla", "size": "openvla-tiny", "config": {}}
TRAIN = {"steps": 4, "validate_every": 4, "save_every": 4, "draws": 1}


def test_a_run_learns_tokens_and_its_actor_executes_what_they_stand_for(card: Path, tmp_path: Path) -> None:
    assert run(tiny(card, policy=POLICY, train=TRAIN), tmp_path / "run").finished
    assert all(np.isfinite(list(losses(tmp_path / "run").values())))
    validated = [event for event in metrics(tmp_path / "run") if "validation/loss" in event]
    assert [event["step"] for event in validated] == [0, 4]
    assert validated[1]["validation/loss"] < validated[0]["validation/loss"]
    for event in validated:
        assert 0 <= event["validation/valid_actions"] <= 1 and event["validation/action_error"] > 0
        assert 0 <= event["validation/token_accuracy"] <= 1
    actor = load_actor(tmp_path / "run" / "checkpoints" / "step_000004", width=2)
    codec, robot = actor.codec, actor.embodiment
    assert codec.action_tokenizer is None and codec.action_bins is not None
    end = codec.action_bins.config.end
    assert codec.required_tokenizer.vocab_size <= end - BINS  # no word is an action
    rng = np.random.default_rng(4)
    pictures = {camera.name: rng.integers(0, 256, camera.shape, np.uint8) for camera in robot.cameras}
    state = rng.normal(size=robot.state.shape).astype(np.float32)
    seen = [Observation(pictures, state, f"move {word}") for word in ("left", "right", "up")]
    chunks = actor.act(seen, [EpisodeKey(number, "dots", 0) for number in range(3)])
    assert (actor.answers, len(chunks)) == (3, 3)
    chunk = np.clip(rng.normal(0, 0.5, (codec.config.chunk, robot.action.shape[0])), -1, 1)
    tokens, _ = codec.action_bins.padded(chunk, np.ones(chunk.shape, np.bool_))
    answer = codec.detokenise(tokens)
    width = chunk.shape[1]
    assert answer.valid and np.abs(answer.chunk[:, :width] - chunk).max() <= 1 / (BINS - 1) + 1e-9
    assert not answer.chunk[:, width:].any()


def test_values_that_no_bin_holds_are_warned_of_and_a_tokenizer_without_effect_is_refused(
    card: Path, tmp_path: Path
) -> None:
    short = TRAIN | {"steps": 1, "validate_every": 0, "save_every": 0}
    recipe = tiny(card, policy=POLICY, train=short, data={"normalisation": "mean_std"})
    run(recipe, tmp_path / "run")
    said = (tmp_path / "run" / "run.json").read_text()
    assert "lie outside [-1, 1] after normalisation by mean_std" in said
    recipe = replace(recipe, policy=replace(recipe.policy, action_tokenizer="somewhere"))
    with pytest.raises(ConfigError, match=r"policy\.action_tokenizer 'somewhere'.*bins"):
        run(recipe, tmp_path / "other")


def test_a_checkpoint_goes_on_with_longer_chunks_and_answers(card: Path, tmp_path: Path) -> None:
    short = TRAIN | {"steps": 1, "validate_every": 0, "save_every": 0}
    assert run(tiny(card, policy=POLICY, train=short), tmp_path / "run").finished
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000001"
    longer = {"checkpoint": str(checkpoint), "family": "", "size": "", "config": {"chunk": 3}}
    for answer_tokens, longest in ((0, 3 * 5 + 1), (30, 30)):
        chosen = longer | {"config": {"chunk": 3, "answer_tokens": answer_tokens}}
        for statistics in ("data", "checkpoint"):
            recipe = tiny(card, policy=chosen, train=short, data={"statistics": statistics})
            bins = build(recipe, torch.device("cpu")).codec.config.action_bins
            assert bins is not None and bins.longest == longest
