"""A run that gives its policy the first steps of chunks (train.max_delay)."""

from pathlib import Path

import pytest

from tests.train.test_two_processes import assert_close
from tests.train.world import tiny, write_dots
from vlafit.actor import load_actor
from vlafit.errors import ConfigError
from vlafit.nn.flow_policy import FlowPolicy
from vlafit.train import run


def test_the_loss_is_exact_in_micro_batches_and_the_checkpoint_keeps_the_delay(tmp_path: Path) -> None:
    card, rare = write_dots(tmp_path), {"save_every": 0, "validate_every": 0}
    for name, train in (("whole", {}), ("parts", {"accumulate": 4}), ("plain", {"max_delay": 0})):
        settings = {"steps": 4, "batch_size": 8, "max_delay": 2, **rare, **train}
        run(tiny(card, train=settings), tmp_path / name)
    assert_close(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(AssertionError):
        assert_close(tmp_path / "whole", tmp_path / "plain")
    for name, expected in (("whole", 2), ("plain", 0)):
        policy = load_actor(tmp_path / name).policy
        assert isinstance(policy, FlowPolicy) and policy.max_delay == expected


def test_a_delay_that_leaves_nothing_of_a_chunk_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    card = write_dots(tmp_path)
    with pytest.raises(ConfigError, match=r"train\.max_delay is 4, .* has 4 steps; set it to at most 3"):
        run(tiny(card, train={"max_delay": 4}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
