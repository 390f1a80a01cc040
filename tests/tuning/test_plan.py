"""What a plan does to a policy and to an optimiser, and what it says about both."""

import json

import pytest
import torch

from tests.tuning.toy import ToyPolicy, step
from vlafit.cli.console import plan_table
from vlafit.errors import StrategyError
from vlafit.nn.policy import ParameterInfo
from vlafit.recipe import OptimRecipe
from vlafit.tuning import Plan, apply_strategy, parse, preview

EXPERT = [{"select": {"part": ["expert", "projections"]}, "mode": "full"}, {"mode": "frozen"}]
OPTIM = OptimRecipe(lr=0.01, weight_decay=0.1)


def optimiser_of(plan: Plan, policy: ToyPolicy) -> torch.optim.AdamW:
    return torch.optim.AdamW(plan.groups(policy, OPTIM))


def test_a_frozen_parameter_is_bit_identical_after_a_step_and_a_trainable_one_is_not(policy: ToyPolicy):
    before = {n: p.detach().clone() for n, p in policy.named_parameters()}
    plan = apply_strategy(policy, EXPERT)
    step(policy, optimiser_of(plan, policy))
    for name, tensor in policy.named_parameters():
        assert torch.equal(tensor, before[name]) == (name not in plan.trainable), name


def test_optimiser_state_exists_for_trainable_parameters_only(policy: ToyPolicy):
    plan = apply_strategy(policy, EXPERT)
    optimiser = optimiser_of(plan, policy)
    step(policy, optimiser)
    tensors = dict(policy.named_parameters())
    assert set(optimiser.state) == {tensors[n] for n in plan.trainable}
    held = sum(s["exp_avg"].nbytes + s["exp_avg_sq"].nbytes for s in optimiser.state.values())
    assert held == plan.rows()[-1]["optimiser_bytes"]


def test_a_frozen_parameter_holds_no_gradient(policy: ToyPolicy):
    step(policy, optimiser_of(apply_strategy(policy, [{"mode": "full"}]), policy))
    assert policy.vision.weight.grad is not None
    apply_strategy(policy, EXPERT)
    assert policy.vision.weight.grad is None


def test_applying_a_second_strategy_replaces_the_first(policy: ToyPolicy):
    apply_strategy(policy, EXPERT)
    apply_strategy(policy, [{"select": {"part": "vision"}, "mode": "full"}, {"mode": "frozen"}])
    assert [n for n, p in policy.named_parameters() if p.requires_grad] == ["vision.weight", "vision.bias"]


def test_a_dead_parameter_is_never_trainable_and_shown_as_dead(policy: ToyPolicy):
    plan = apply_strategy(policy, [{"mode": "full"}])
    assert not policy.language[2].mlp.weight.requires_grad
    assert set(plan.trainable) == {n for n, _ in policy.named_parameters()} - {
        "language.2.mlp.weight",
        "language.2.mlp.bias",
    }
    assert plan.table[0].dead == 4 * 4 + 4


def test_every_trainable_parameter_of_a_full_plan_gets_a_gradient(policy: ToyPolicy):
    plan = apply_strategy(policy, [{"mode": "full"}])
    step(policy, optimiser_of(plan, policy))
    assert [n for n, p in policy.named_parameters() if p.grad is not None] == plan.trainable


def test_weight_decay_is_for_matrices_and_kernels_not_for_norms_biases_and_embeddings(policy: ToyPolicy):
    groups = apply_strategy(policy, [{"mode": "full"}]).groups(policy, OPTIM)
    decays = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert decays["vision.weight"] == decays["expert.0.mlp.weight"] == decays["actions.weight"] == 0.1
    assert decays["expert.0.mlp.bias"] == decays["expert.0.norm.weight"] == decays["embed.weight"] == 0.0


def test_a_rule_multiplies_the_learning_rate_and_replaces_the_weight_decay(policy: ToyPolicy):
    rules = [{"select": {"part": "vision"}, "mode": "full", "lr": 0.1, "weight_decay": 0.5}, {"mode": "full"}]
    groups = apply_strategy(policy, rules).groups(policy, OPTIM)
    by_name = {name: (g["lr"], g["weight_decay"]) for g in groups for name in g["names"]}
    assert by_name["vision.weight"] == (pytest.approx(0.001, rel=2**-51), 0.5)
    assert by_name["vision.bias"] == (pytest.approx(0.001, rel=2**-51), 0.0)
    assert by_name["expert.0.mlp.weight"] == (0.01, 0.1)


def test_groups_hold_each_trainable_parameter_once_with_its_name(policy: ToyPolicy):
    plan = apply_strategy(
        policy, [{"select": {"part": "vision"}, "mode": "full", "lr": 0.1}, {"mode": "full"}]
    )
    tensors = dict(policy.named_parameters())
    pairs = [pair for g in plan.groups(policy, OPTIM) for pair in zip(g["names"], g["params"], strict=True)]
    assert sorted(name for name, _ in pairs) == sorted(plan.trainable)
    assert all(tensors[name] is tensor for name, tensor in pairs)


def test_the_table_counts_every_parameter_once_and_ends_with_the_total(policy: ToyPolicy):
    plan = apply_strategy(policy, EXPERT)
    *rows, total = plan.rows()
    assert total["rule"] == 0
    for column in ("tensors", "parameters", "trainable", "dead", "optimiser_bytes"):
        assert sum(row[column] for row in rows) == total[column]
    assert total["parameters"] == sum(p.numel() for p in policy.parameters()) == plan.parameters
    assert total["trainable"] == sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert rows[0]["select"] == "expert+projections" and rows[1]["select"] == "everything else"
    json.dumps(plan.rows())


def test_the_table_shows_the_range_of_learning_rates_that_a_rule_gives(policy: ToyPolicy):
    rules = [
        {"select": {"part": "expert"}, "mode": "full", "lr": 2.0, "layer_decay": 0.5},
        {"select": {"part": "vision"}, "mode": "full", "lr": 0.3},
        {"mode": "frozen"},
    ]
    plan = apply_strategy(policy, rules)
    assert [(row.lr_lowest, row.lr) for row in plan.table] == [(0.25, 2.0), (0.3, 0.3), (0.0, 0.0)]
    assert " 0.25..2 " in plan_table(plan.rows()) and " 0.3 " in plan_table(plan.rows())
    staged = {"stage": [{"lr": 0.1, "rule": rules}]}
    assert preview(ToyPolicy(), parse(staged, name="mine", where="test")).table[0].lr == pytest.approx(
        0.2, rel=2**-51
    )


def test_a_plan_that_was_saved_before_its_table_had_ranges_is_read(policy: ToyPolicy):
    plan = apply_strategy(policy, EXPERT)
    values = json.loads(plan.to_json())
    for row in values["table"]:
        row.pop("lr_lowest")
    assert Plan.from_json(json.dumps(values)) == plan
    values["table"][0]["trainable"] += 1
    with pytest.raises(StrategyError, match="plan.json.*table"):
        Plan.from_json(json.dumps(values))


def test_a_plan_survives_json(policy: ToyPolicy):
    rules = [
        {
            "select": {"part": "language", "kind": ["mlp", "norm"], "layers": "last 2"},
            "mode": "full",
            "lr": 0.3,
        },
        {"select": {"pattern": "vision.*"}, "mode": "full", "weight_decay": 0.0},
        {"select": {"part": "vision"}, "mode": "frozen", "optional": True},
        {"mode": "frozen"},
    ]
    plan = apply_strategy(policy, rules)
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    "damage",
    [
        lambda v: v.pop("tensors"),
        lambda v: v.update(format=99),
        lambda v: v["tensors"].pop(),
        lambda v: v["tensors"][0].update(surplus=1),
        lambda v: v["strategy"]["rule"][0].update(mode="melt"),
    ],
)
def test_a_damaged_plan_is_refused(policy: ToyPolicy, damage):
    values = json.loads(apply_strategy(policy, EXPERT).to_json())
    damage(values)
    with pytest.raises(StrategyError, match=r"plan\.json"):
        Plan.from_json(json.dumps(values))
    with pytest.raises(StrategyError, match="damaged"):
        Plan.from_json("{")


def test_a_strategy_that_trains_nothing_is_an_error_and_leaves_the_policy_alone(policy: ToyPolicy):
    with pytest.raises(StrategyError, match="trains nothing in this ToyPolicy"):
        apply_strategy(policy, [{"mode": "frozen"}])
    with pytest.raises(StrategyError, match="trains nothing in this ToyPolicy.*loss"):
        apply_strategy(
            policy, [{"select": {"pattern": "language.2.mlp.*"}, "mode": "full"}, {"mode": "frozen"}]
        )
    assert all(p.requires_grad for p in policy.parameters())


def test_weight_decay_for_what_never_decays_is_an_error(policy: ToyPolicy):
    with pytest.raises(StrategyError, match=r"rule 1 \(norm\) .*weight_decay.*norms, biases"):
        apply_strategy(
            policy, [{"select": {"kind": "norm"}, "mode": "full", "weight_decay": 0.1}, {"mode": "full"}]
        )


def test_a_plan_of_another_policy_makes_no_groups(policy: ToyPolicy):
    plan = apply_strategy(policy, EXPERT)
    with pytest.raises(
        StrategyError, match="strategy 'rules'.*26 of its trainable tensors.*expert.0.norm.weight"
    ):
        plan.groups(torch.nn.Linear(2, 2), OPTIM)


def test_a_policy_whose_parts_do_not_name_every_parameter_once_is_refused(policy: ToyPolicy):
    class Forgetful(ToyPolicy):
        def parts(self) -> list[ParameterInfo]:
            return super().parts()[1:]

    with pytest.raises(
        StrategyError, match=r"Forgetful\.parts\(\) does not name every parameter.*vision\.weight"
    ):
        apply_strategy(Forgetful(), [{"mode": "full"}])
