"""Every shipped strategy on every family means what it says: what it adapts, trains and leaves alone.

A new family is covered because it is registered, a new strategy fails here until `MEANT` says what it means.
"""

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass

import pytest
import torch

import vlafit
from tests.variants import variants
from vlafit import shipped
from vlafit.errors import StrategyError
from vlafit.nn.policy import ParameterInfo, Policy
from vlafit.nn.random_batch import random_batch
from vlafit.nn.rng import sample_rng
from vlafit.policies import build_family, families, family
from vlafit.tuning import apply, enter, load_strategy, preview
from vlafit.tuning.inject import base_name, layer_kind

TINY = {size: name for name in families() for size in family(name).SIZES if size.endswith("-tiny")}
Chosen = Callable[[ParameterInfo], bool]


def within(*parts: str, kinds: Collection[str] = ()) -> Chosen:
    return lambda info: (not parts or info.part in parts) and (not kinds or info.kind in kinds)


nothing: Chosen = lambda info: False  # noqa: E731
PRODUCTS = ("attention", "mlp")
EVERY_LAYER = (*PRODUCTS, "conv", "linear")


@dataclass(frozen=True)
class Meant:
    """What one stage of a strategy means, and the parts without which it has no meaning."""

    trained: Chosen
    adapted: Chosen = nothing
    needs: frozenset[str] = frozenset()


def stages(*meant: Meant) -> tuple[Meant, ...]:
    return meant


LORA = stages(
    Meant(
        within("projections"),
        within("vision", "language", "expert", kinds=PRODUCTS),
        frozenset({"vision", "language"}),
    )
)
FIRST = frozenset({"projections", "expert", "language"})


def _first(info: ParameterInfo) -> bool:
    return info.part == "projections" or (info.part, info.kind) == ("expert", "norm")


MEANT: dict[str, tuple[Meant, ...]] = {
    **dict.fromkeys(
        ("adalora", "dora", "ia3", "loha", "lokr", "lora", "miss", "oft", "qlora", "rslora"), LORA
    ),
    "full": stages(Meant(within())),
    "insulated": stages(Meant(within(), needs=frozenset({"another loss"}))),
    "slow-backbone": stages(Meant(within(), needs=frozenset({"language", "vision", "projector"}))),
    "frozen-vision": stages(Meant(lambda info: info.part != "vision", needs=frozenset({"vision"}))),
    "expert": stages(Meant(within("expert", "projections"), needs=frozenset({"expert", "projections"}))),
    "projections": stages(Meant(within("projections"), needs=frozenset({"projections"}))),
    **{
        name: stages(
            Meant(
                lambda info, kind=kind: (
                    info.part == "projections" or within("language", "expert", kinds=[kind])(info)
                ),
                needs=frozenset({"language"}),
            )
        )
        for name, kind in (("attention", "attention"), ("mlp", "mlp"))
    },
    "lora-all": stages(Meant(nothing, within(kinds=(*EVERY_LAYER, "embedding")))),
    "openpi-lora": stages(
        Meant(
            within("vision", "projector", "projections"),
            within("language", "expert", kinds=PRODUCTS),
            frozenset({"vision", "projector", "language"}),
        )
    ),
    "openvla-oft": stages(
        Meant(
            within("expert", "projections", "film"),
            within("vision", "projector", "language", kinds=EVERY_LAYER),
            frozenset({"vision", "projector", "language"}),
        )
    ),
    "progressive-lora": stages(
        Meant(_first, needs=FIRST),
        Meant(_first, within("expert", kinds=PRODUCTS)),
        Meant(_first, within("vision", "language", "expert", kinds=PRODUCTS)),
    ),
    "progressive": stages(
        Meant(_first, needs=FIRST), Meant(within("projections", "expert")), Meant(within())
    ),  # between the last two the language model is unfrozen from the top
}


@functools.cache
def on_meta(size: str) -> Policy:
    return build_family(TINY[size], size, {}, device="meta")


def lacking(size: str, needs: Collection[str]) -> list[str]:
    parts = {info.part for info in on_meta(size).parts()}
    losses = {"another loss"} if len(on_meta(size).terms()) > 1 and "expert" in parts else set()
    return sorted(set(needs) - parts - losses)


def test_every_shipped_strategy_has_its_meaning_written_down():
    assert set(MEANT) == set(shipped.names("strategy"))


@pytest.mark.parametrize("size", TINY)
@pytest.mark.parametrize("name", MEANT)
def test_a_shipped_strategy_trains_what_it_means_or_names_the_part_that_is_not_there(name: str, size: str):
    policy, strategy, meant = on_meta(size), load_strategy(name), MEANT[name]
    if lacks := lacking(size, meant[0].needs):
        with pytest.raises(StrategyError) as refused:
            preview(policy, strategy)
        said = str(refused.value)
        words = {"another loss": "stop_gradient"}
        assert any(words.get(lack, lack) in said for lack in lacks), said
        assert any(way in said for way in (f"my-{name}.toml", "can be one of", "remove"))  # and what to do
        return
    plan = preview(policy, strategy)
    count = len(plan.strategy.stages)
    assert count >= len(meant)
    numbers = [*range(len(meant) - 1), count - 1]
    infos = [info for info in policy.parts() if not info.dead]
    for number, one in zip(numbers, meant, strict=True):
        entries = plan.at(number).entries
        adapted = {info.name for info in infos if one.adapted(info) and layer_kind(policy, info.name)}
        trained = {info.name for info in infos if one.trained(info)}
        assert {e.name for e in entries if e.trainable and not e.adapts} == trained - adapted
        assert {e.adapts for e in entries if e.trainable and e.adapts} == adapted
        assert trained or adapted
    for number in range(1, count):  # unfreezing never freezes again
        before, after = ({e.name for e in plan.at(n).entries if e.trainable} for n in (number - 1, number))
        assert before <= after


def learned(size: str, name: str) -> tuple[Policy, Policy, set[str]]:
    """The policy before, and after two steps by the strategy, with what it was to learn."""
    before = build_family(TINY[size], size, {}, torch.Generator().manual_seed(0))
    policy = build_family(TINY[size], size, {}, torch.Generator().manual_seed(0))
    rng = torch.Generator().manual_seed(1)
    for one, other in zip(before.parameters(), policy.parameters(), strict=True):
        noise = 0.05 * torch.randn(one.shape, generator=rng)  # so that no tensor is without effect
        one.data += noise
        other.data += noise
    batch, keys = random_batch(policy.needs(), 2), [(0, 0), (0, 1)]
    plan = apply(policy, load_strategy(name), probe=lambda: answer(policy))  # raises where it changes
    plan = plan.at(len(plan.strategy.stages) - 1)  # in which all adapters learn
    enter(policy, plan)
    policy.train()
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    for step in range(2):
        loss = torch.stack(list(policy(batch, sample_rng(keys, seed=step)).values())).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return before, policy, set(plan.trainable)


def answer(policy: Policy) -> torch.Tensor:
    """Numbers that depend on all of the policy: its losses in evaluation mode."""
    policy.eval()
    batch = random_batch(policy.needs(), 2)
    with torch.no_grad():
        return torch.stack(list(policy(batch, sample_rng([(0, 0), (0, 1)], seed=0)).values()))


ADAPTING = [name for name, meant in MEANT.items() if meant[-1].adapted is not nothing and name != "qlora"]
PAIRS = [(name, size) for name in ADAPTING for size in TINY if not lacking(size, MEANT[name][0].needs)]
ALWAYS = [
    *(("lora", size) for size in ("groot-tiny", "pi0-fast-tiny", "openvla-tiny")),
    ("lora-all", "act-tiny"),
    ("openvla-oft", "openvla-oft-tiny"),
    ("dora", "xvla-tiny"),
    ("oft", "smolvla-tiny"),
    ("oft", "xvla-tiny"),  # inputs of four dimensions
    ("lora-all", "openvla-oft-tiny"),  # adapters on the towers' embeddings
    ("progressive-lora", "pi0-tiny"),
]


@pytest.mark.parametrize("pair", variants(PAIRS, always=ALWAYS), ids="-".join)
def test_adapters_change_nothing_at_first_then_only_what_learns_and_merge_without_a_trace(
    pair: tuple[str, str],
):
    name, size = pair
    before, policy, learns = learned(size, name)
    start = dict(before.named_parameters())
    changed = {
        n
        for n, p in policy.named_parameters()
        if base_name(n) in start and not torch.equal(p, start[base_name(n)])
    }
    assert {base_name(n) for n in changed} <= learns  # what is frozen keeps its bits
    moved = {
        n for n, p in policy.named_parameters() if p.requires_grad and p.grad is not None and p.grad.any()
    }
    assert any(base_name(n) not in start for n in moved)  # adapters learn
    adapted = answer(policy)
    merged = vlafit.merge(policy)
    assert [n for n, _ in merged.named_parameters()] == list(start)
    assert {type(m) for m in merged.modules()} == {type(m) for m in before.modules()}
    # 8 roundings on each of 32 products in a row, of sums of 64: 2^-24 * sqrt(8 * 32 * 64) = 8e-6 of it.
    torch.testing.assert_close(answer(merged), adapted, rtol=8e-6, atol=1e-5)


def test_insulation_trains_everything_where_there_is_a_token_loss_beside_that_of_the_actions():
    policy = build_family("pi0", "pi05-tiny", {"action_tokens": 16}, device="meta")
    plan = preview(policy, load_strategy("insulated"))
    assert set(plan.trainable) == {info.name for info in policy.parts() if not info.dead}
