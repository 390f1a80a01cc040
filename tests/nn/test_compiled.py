"""Compiled blocks: the numbers of eager ones, whatever the length of the prompt."""

from typing import Literal

import pytest
import torch
from torch._dynamo.utils import counters

from tests.variants import variants
from vlafit.nn.batch import Batch
from vlafit.nn.compiled import compile_blocks, text_multiple
from vlafit.nn.policy import Policy
from vlafit.nn.random_batch import random_batch
from vlafit.nn.recompute import recompute_blocks
from vlafit.nn.rng import sample_rng
from vlafit.policies import build_family, families, family
from vlafit.tuning import apply_strategy

ROUNDINGS = 2**10  # that may add up in a loss or gradient of this policy


def policy_of() -> Policy:
    return build_family("pi0", "pi0-tiny", generator=torch.Generator().manual_seed(0)).train()


def batch_of(policy: Policy, length: int, seed: int) -> Batch:
    """Return two samples whose prompts have `length` tokens, one of them less."""
    needs, rng = policy.needs(), torch.Generator().manual_seed(seed)
    side = needs.image_size
    token_mask = torch.ones(2, length, dtype=torch.bool)
    token_mask[0, -1] = False
    return Batch(
        images=torch.randint(0, 256, (2, 2, 3, side, side), dtype=torch.uint8, generator=rng),
        image_mask=torch.ones(2, 2, dtype=torch.bool),
        tokens=torch.randint(1, needs.vocabulary, (2, length), generator=rng),
        token_mask=token_mask,
        state=torch.randn(2, needs.state_dim, generator=rng),
        actions=torch.randn(2, needs.chunk, needs.action_dim, generator=rng),
    )


def losses_and_gradients(policy: Policy) -> list[torch.Tensor]:
    values = []
    for seed, length in enumerate((4, 8, 12, 4)):
        policy.zero_grad()
        out = policy(batch_of(policy, length, seed).to("cpu"), sample_rng([(0, 0), (0, 1)], seed=seed))
        out["error"].backward()
        gradients = [p.grad.flatten() for p in policy.parameters() if p.grad is not None]
        values += [out["error"].detach(), torch.cat(gradients)]
    return values


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("backend", variants(["eager", "inductor"], always=["eager"]))
def test_compiled_blocks_train_like_eager_ones_when_the_length_changes(
    backend: str, recompute: Literal["none", "full"]
) -> None:
    want = losses_and_gradients(policy_of())
    policy = policy_of()
    compile_blocks(policy, only_training=True, backend=backend)
    recompute_blocks(policy, recompute)
    bound = 0.0 if backend == "eager" else ROUNDINGS * torch.finfo(torch.float32).eps
    for value, reference in zip(losses_and_gradients(policy), want, strict=True):
        assert float((value - reference).norm() / reference.norm()) <= bound


def test_a_policy_in_evaluation_mode_runs_its_blocks_uncompiled() -> None:
    def fails(*_: object) -> None:
        raise AssertionError("compiled")

    policy = policy_of().eval()
    compile_blocks(policy, only_training=True, backend=fails)  # type: ignore[arg-type]
    policy(batch_of(policy, 4, 0).to("cpu"), sample_rng([(0, 0), (0, 1)], seed=0))


@pytest.mark.parametrize(("tokens", "multiple"), [(12, 16), (48, 16), (64, 16), (200, 64), (256, 64)])
def test_prompts_come_in_four_lengths_at_most(tokens: int, multiple: int) -> None:
    assert text_multiple(tokens) == multiple
    assert -(-tokens // multiple) <= 4


SIZES = {size: name for name in families() for size in family(name).SIZES if size.endswith("-tiny")}


@pytest.mark.parametrize("precision", variants(["fp32", "bf16"], always=["bf16"]))
@pytest.mark.parametrize("strategy", variants(["full", "lora"], always=["full"]))
@pytest.mark.parametrize("size", variants(SIZES, always=["pi0-tiny", "smolvla-tiny"]))
def test_no_block_breaks_into_several_graphs(size: str, strategy: str, precision: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    policy = build_family(SIZES[size], size, {}, device="cpu")
    if strategy == "lora":
        if size == "act-tiny":
            pytest.skip("ACT has no language model")
        apply_strategy(policy, "lora")
    compile_blocks(policy, only_training=True, backend="eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        policy.train()(random_batch(policy.needs(), rows=2), sample_rng([(0, 0), (0, 1)], seed=0))
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert counters["stats"]["unique_graphs"] > 0
