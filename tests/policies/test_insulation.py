"""Knowledge insulation: with stop_gradient = "prefix" the flow loss never reaches vision and language."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from tests.policies.tiny import random_batch, random_draws, random_policy
from vlafit.errors import StrategyError
from vlafit.nn.flow_policy import FlowPolicy
from vlafit.policies import build_family
from vlafit.train.batch_shape import BatchShape
from vlafit.train.flops import FlopCounter
from vlafit.train.forecast import Workload, forecast
from vlafit.tuning import Plan, apply_strategy, enter, parse, preview

FROZEN = {"mode": "frozen"}
EXPERT = {"select": {"part": "expert"}, "mode": "full"}
LANGUAGE = {"select": {"part": "language", "kind": "mlp"}, "mode": "full"}
INSULATED = {"stop_gradient": "prefix", "rule": [EXPERT, FROZEN]}


def gradients(policy: FlowPolicy) -> Mapping[str, Tensor]:
    policy.zero_grad(set_to_none=True)
    noise, time = random_draws(policy.config, draws=2)
    policy.flow_loss(random_batch(policy.config), noise, time)["loss"].backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("size", ["pi0-tiny", "pi05-tiny", "smolvla-tiny"])
def test_the_prefix_gets_no_gradient_and_the_expert_the_same_one(size: str) -> None:
    policy = random_policy(size)
    joint = gradients(policy)
    policy.stop_gradient = "prefix"
    insulated = gradients(policy)
    inside = {id(p) for module in policy.prefix_modules() for p in module.parameters()}
    prefix = {name for name, p in policy.named_parameters() if id(p) in inside}
    parts = {info.name: info.part for info in policy.parts()}
    assert {name for name, part in parts.items() if part in ("vision", "projector", "language")} <= prefix
    reached = {name for name in prefix if name in joint and joint[name].any()}
    assert {parts[name] for name in reached} >= {"vision", "projector", "language"}  # without insulation
    assert not prefix & set(insulated)
    assert set(insulated) == set(joint) - prefix
    assert all(torch.equal(gradient, joint[name]) for name, gradient in insulated.items())


def test_a_strategy_switches_it_on_in_its_stages_and_a_plan_keeps_it() -> None:
    rules = [EXPERT, FROZEN]
    stages = {"stage": [{"rule": rules, "stop_gradient": "prefix"}, {"begin": {"step": 5}, "rule": rules}]}
    policy = random_policy("pi0-tiny")
    plan = apply_strategy(policy, stages)
    assert policy.stop_gradient == "prefix"
    enter(policy, plan.at(1))
    assert policy.stop_gradient == ""
    for table in (stages, INSULATED):
        again = preview(random_policy("pi0-tiny"), parse(table, name="x", where="here"))
        assert Plan.from_json(again.to_json()) == again
        assert again.strategy.stages[0].stop_gradient == "prefix"


def test_what_could_never_learn_is_refused() -> None:
    for rules in ([{"mode": "full"}], [LANGUAGE, EXPERT, FROZEN]):
        with pytest.raises(StrategyError, match=r"stop_gradient = 'prefix'.*(vision|language).*never learn"):
            apply_strategy(random_policy("pi0-tiny"), {"stop_gradient": "prefix", "rule": rules})
    with pytest.raises(StrategyError, match=r"stop_gradient = 'prefix'.*Act"):
        act = build_family("act", "act-tiny", {}, device="meta")
        preview(act, parse({"stop_gradient": "prefix", "rule": [{"mode": "full"}]}, name="x", where="here"))
    with pytest.raises(StrategyError, match="`stop_gradient` must be"):
        parse({"stop_gradient": "expert", "rule": [FROZEN]}, name="x", where="here")


@pytest.mark.slow
def test_forecast_and_flop_counter_know_that_the_prefix_keeps_nothing() -> None:
    shallow = {"vision.depth": 1, "language.depth": 2}
    bare = build_family("smolvla", "smolvla-tiny", shallow, device="meta")
    tables = ({"rule": [{"mode": "full"}]}, {"rule": [EXPERT, FROZEN]}, INSULATED)
    full, frozen, insulated = (parse(table, name="x", where="here") for table in tables)
    kept = {
        s: forecast(bare, s, Workload(2, precision="fp32")).activations for s in (full, frozen, insulated)
    }
    flops = {
        s: FlopCounter(bare, preview(bare, s), 1)(BatchShape(1, 2, 12)) for s in (full, frozen, insulated)
    }
    for counted in (kept, flops):
        assert counted[insulated] == counted[frozen] < counted[full]
