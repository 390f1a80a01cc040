"""Resolution: each rule is matched against a policy's tensors once for each stage."""

import pytest

from tests.tuning.toy import ToyPolicy
from vlafit.policies import build_family
from vlafit.tuning import Plan, apply, enter, load_strategy, parse, preview, resolution, rules
from vlafit.tuning.ranks import rank_schedule


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of strategy and stage in each call of `rules.decide`."""
    calls: list[str] = []
    decide = rules.decide

    def counted(infos, stage_rules, name):
        calls.append(name)
        return decide(infos, stage_rules, name)

    for module in (rules, resolution):
        monkeypatch.setattr(module, "decide", counted)
    return calls


@pytest.mark.parametrize(("name", "stages"), [("expert", 1), ("lora", 1), ("progressive", 4)])
def test_applying_a_strategy_decides_once_for_each_stage(decided: list[str], name: str, stages: int):
    policy = build_family("pi0", "pi0-tiny", {})
    plan = apply(policy, load_strategy(name))
    assert len(plan.strategy.stages) == len(set(decided)) == len(decided) == stages


def test_what_is_read_from_a_plan_and_a_change_of_stage_decide_nothing(decided: list[str], policy: ToyPolicy):
    frozen, adalora = (
        {"mode": "frozen"},
        {"select": {"kind": "mlp", "pattern": "*.weight"}, "mode": "adalora"},
    )
    staged = {
        "stage": [
            {"rule": [{"select": {"part": "projections"}, "mode": "full"}, frozen]},
            {"begin": {"step": 4}, "rule": [adalora, frozen]},
        ]
    }
    plan = apply(policy, parse(staged, name="mine", where="test"))
    decided.clear()
    assert plan.adapted and not plan.quantised
    for stage in (1, 0):
        enter(policy, plan.at(stage))
        rank_schedule(policy, plan.at(stage))
    assert plan.at(1).at(0) == plan and decided == []
    assert Plan.from_json(plan.to_json()) == plan
    assert len(decided) == 2  # a file is resolved anew, once for each stage


def test_a_resolution_names_the_rule_of_each_tensor_in_each_stage(policy: ToyPolicy):
    expert = {"select": {"part": "expert"}, "mode": "full"}
    staged = {
        "stage": [
            {"name": "first", "rule": [expert, {"mode": "frozen"}]},
            {"name": "all", "begin": {"fraction": 0.5}, "rule": [{"mode": "full"}]},
        ]
    }
    table = preview(policy, parse(staged, name="mine", where="test")).resolution
    assert [table.rule(stage, "vision.weight").mode for stage in (0, 1)] == ["frozen", "full"]
    assert table.chosen[0]["expert.0.mlp.weight"] == 0
    assert table.where(1, 0) == "strategy 'mine, stage 2 (all)': rule 1 (everything else; full)"
