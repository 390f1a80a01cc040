"""Every family that ships: what it answers to an observation does not depend on its place in the batch."""

import dataclasses
import importlib
import pkgutil
from collections.abc import Iterator

import pytest
import torch

import vlafit.policies
from vlafit.nn.activations import same_rows
from vlafit.nn.batch import Batch
from vlafit.nn.random_batch import random_batch
from vlafit.nn.rng import rollout_rng
from vlafit.types import EpisodeKey

SIZES = [
    (module.name, size)
    for module in pkgutil.iter_modules(vlafit.policies.__path__)
    if not module.name.startswith("_")
    for size in getattr(importlib.import_module(f"vlafit.policies.{module.name}"), "SIZES", ())
    if size.endswith("-tiny")
]
ROWS = 8


def rolled(batch: Batch, by: int) -> Batch:
    values = ((field.name, getattr(batch, field.name)) for field in dataclasses.fields(batch))
    return dataclasses.replace(batch, **{n: v.roll(by, 0) for n, v in values if isinstance(v, torch.Tensor)})


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that share a product into 24 numbers, a width of these sizes only, round by the place."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("family", "size"), SIZES)
def test_a_row_has_the_same_answer_at_each_place_in_a_batch(family: str, size: str) -> None:
    module = importlib.import_module(f"vlafit.policies.{family}")
    policy = module.build(module.SIZES[size], "cpu").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if not parameter.any():  # a head of zeros would hide what comes before it
                parameter.normal_(0.0, 0.1, generator=generator)
    needs = policy.needs()
    batch = dataclasses.replace(random_batch(needs, ROWS), actions=None, action_mask=None)
    batch.image_mask[2, ..., -1] = False
    if batch.token_mask is not None:
        batch.token_mask[1, -3:] = False
    if needs.embodiments:
        batch.embodiment_id = torch.arange(ROWS) % (len(needs.embodiment_rows) or needs.embodiments)
    keys = [EpisodeKey(i, "left", 0) for i in range(ROWS)]
    with torch.no_grad(), same_rows(ROWS):
        answer = policy.act(batch, rollout_rng(keys, seed=0))
        assert answer.isfinite().all()
        assert len(answer.flatten(1).unique(dim=0)) > 1  # rows differ, so that a swap would show
        for by in range(1, ROWS):
            moved = policy.act(rolled(batch, by), rollout_rng(keys[-by:] + keys[:-by], seed=0))
            assert torch.equal(moved, answer.roll(by, 0))
