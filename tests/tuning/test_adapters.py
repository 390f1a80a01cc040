"""Every adapter on a policy of pi0's shape: no effect at first, learns, leaves the rest alone, merges."""

import math
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from peft.functional import get_peft_model_state_dict
from peft.tuners.adalora.layer import RankAllocator
from peft.tuners.lora.dora import DoraLinearLayer

import vlafit
from tests.rounding import ADAPTED_PATH, ROUNDINGS, TERMS, drift, unit_roundoff
from tests.tuning.world import METHODS, QUANTISED, make_batch, make_policy, probe, rules, train, velocity
from tests.variants import variants
from vlafit.checkpoints.formats.native import adapters as adapted
from vlafit.errors import StrategyError, TrainingError
from vlafit.nn.attached import Attached, attached
from vlafit.recipe import OptimRecipe
from vlafit.tuning import apply, apply_strategy, enter, parse, preview
from vlafit.tuning.dora import FactoredDoraLayer
from vlafit.tuning.inject import adapted_layers, adapter_tensors, base_name, make_groups, peft_config
from vlafit.tuning.merge import merge
from vlafit.tuning.quantise import stored_bytes
from vlafit.tuning.ranks import Clock, rank_schedule

REST = {"mode": "frozen"}


def strategy(*tables: dict, name: str = "mine"):
    return parse(tables, name=name, where="test")


@pytest.mark.parametrize(
    "name", variants(METHODS, always=[m for m in METHODS if m not in ("rslora", "gaussian")])
)
def test_an_adapter_changes_nothing_until_it_learns_and_then_everything_it_has_learns(name: str):
    policy = make_policy()
    plan = apply(policy, strategy(*rules(name)), probe=probe(policy))  # raises where the output changes
    start = {n: p.detach().clone() for n, p in policy.named_parameters()}
    losses = train(policy)
    assert losses[-1] < losses[0]
    learning = {n for n, p in policy.named_parameters() if p.requires_grad}
    assert {base_name(n) for n in learning} == set(plan.trainable)
    changed = {n for n, p in policy.named_parameters() if not torch.equal(p, start[n])}
    assert changed == learning  # frozen tensors keep their bits, and nothing that learns stood still


@pytest.mark.parametrize("name", variants([*METHODS, *QUANTISED], always=["lora", "dora", "oft", "nf4"]))
def test_merging_keeps_the_outputs_and_leaves_a_plain_policy(name: str):
    policy = make_policy()
    names = [n for n, _ in policy.named_parameters()]
    apply_strategy(policy, rules(name))
    train(policy)
    before = velocity(policy)
    assert merge(policy) is policy
    assert [n for n, _ in policy.named_parameters()] == names
    assert {type(m) for m in policy.modules()} == {type(m) for m in make_policy().modules()}
    # Every product sums up to TERMS numbers; all their roundings are 8e-6 of the outputs, which are about 1.
    bound = drift(unit_roundoff(torch.float32), ROUNDINGS * ADAPTED_PATH * TERMS, before.abs().max())
    assert (velocity(policy) - before).abs().max() < min(bound, 1e-5)
    apply_strategy(policy, rules("lora"))  # and it can be adapted again


@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_base_is_near_the_policy_and_what_sits_on_it_learns(name: str):
    policy = make_policy()
    before = velocity(policy)
    plan = apply(policy, strategy(*rules(name)), probe=probe(policy))  # compared after rounding
    # Each weight is rounded once: int8 has 127 steps from zero to a row's largest, so half a step is 1 / 254;
    # nf4's widest step, from 0.70 to 1, would allow 1.7 of the outputs, so there they are only told apart.
    bound = 1.0 if name == "nf4" else drift(1 / 254, ADAPTED_PATH, before.abs().max())
    assert 0 < (velocity(policy) - before).abs().max() < min(bound, 1.0)
    base = {n: p.detach().clone() for n, p in policy.named_parameters() if "base_layer" in n}
    losses = train(policy)
    assert losses[-1] < losses[0]
    tensors = dict(policy.named_parameters())
    assert all(torch.equal(_stored(tensors[n]), _stored(p)) for n, p in base.items())
    assert plan.parameters == preview(make_policy(), strategy({"mode": "full"})).parameters


def test_the_bytes_of_a_quantised_weight_are_those_it_takes():
    plain, policy = make_policy(), make_policy()
    apply_strategy(policy, rules("int8"))
    layer = "language.layers.0.mlp.up_proj"
    whole = plain.get_parameter(f"{layer}.weight")
    rounded = policy.get_parameter(f"{layer}.base_layer.weight")
    assert stored_bytes(whole) == 4 * whole.numel()
    scales = 5 * len(whole)  # of each row a float32 scale and an int8 zero point
    assert stored_bytes(rounded) == whole.numel() + scales


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.qdata if hasattr(tensor, "qdata") else tensor.data  # torchao's subclass compares nothing


def test_several_adapters_full_and_frozen_parts_live_in_one_policy():
    policy = make_policy()
    plan = apply_strategy(
        policy,
        [
            {"select": {"part": "expert"}, "mode": "full", "lr": 0.5},
            {"select": {"part": "language", "kind": "attention"}, "mode": "lora", "rank": 2},
            {"select": {"part": "language", "kind": "mlp"}, "mode": "dora", "rank": 3, "alpha": 6},
            {"select": {"part": "vision", "kind": "mlp"}, "mode": "loha", "rank": 2},
            {"select": {"part": "projections"}, "mode": "full"},
            REST,
        ],
    )
    assert {g.name for g in make_groups(plan.adapted)} == {"lora", "dora", "loha"}
    start = {n: p.detach().clone() for n, p in policy.named_parameters()}
    train(policy)
    changed = {base_name(n) for n, p in policy.named_parameters() if not torch.equal(p, start[n])}
    assert changed == set(plan.trainable)  # each layer goes on using its own adapter
    rows = {row.mode: row for row in plan.table if row.mode != "full"}
    assert rows["lora"].parameters > rows["lora"].trainable == rows["lora"].adapter > 0
    assert rows["frozen"].trainable == 0
    assert plan.trainable_parameters == sum(p.numel() for p in policy.parameters() if p.requires_grad)


def test_rules_of_one_method_with_other_ranks_share_a_group_and_other_settings_do_not():
    ranks = strategy(
        {"select": {"part": "language", "kind": "mlp"}, "mode": "lora", "rank": 2},
        {"select": {"part": "expert", "kind": "mlp"}, "mode": "lora", "rank": 5},
        {"select": {"part": "expert", "kind": "attention"}, "mode": "lora", "rank": 2, "rslora": True},
        REST,
    )
    policy = make_policy()
    plan = apply(policy, ranks)
    assert [g.name for g in make_groups(plan.adapted)] == ["lora", "lora_2"]
    shapes = {e.name: e.shape for e in plan.entries if e.adapts}
    assert shapes["language.layers.0.mlp.up_proj.lora_A.lora.weight"][0] == 2
    assert shapes["expert.layers.0.mlp.up_proj.lora_A.lora.weight"][0] == 5
    assert "expert.layers.0.self_attn.q_proj.lora_A.lora_2.weight" in shapes


@pytest.mark.parametrize("name", variants(METHODS, always=["dora", "oft"]))
def test_peft_itself_reads_the_names_and_settings_that_we_write(name: str, tmp_path):
    policy = make_policy()
    plan = apply_strategy(policy, rules(name))
    train(policy)
    (tmp_path / "adapters").mkdir()
    adapted.write(tmp_path, policy, plan, dict(policy.named_parameters()), None)
    for group in make_groups(plan.adapted):
        other = make_policy() if name != "pissa" else _residual(policy)
        model = PeftModel.from_pretrained(other, str(tmp_path / "adapters" / group.name))
        if len(make_groups(plan.adapted)) == 1:
            _copy_projections(policy, other)
            # The same operations, except for the norms of DoRA's rows; 1e-6 is 16 roundings at outputs of 1.
            torch.testing.assert_close(velocity(model.base_model.model), velocity(policy), atol=1e-6, rtol=0)
        ours = {adapted.PREFIX + k for k in _peft_reads(policy, group.name)}
        assert ours == {
            adapted.PREFIX + k.removeprefix(adapted.PREFIX) for k in get_peft_model_state_dict(model)
        }


def _peft_reads(policy, name: str) -> dict[str, torch.Tensor]:
    """What peft saves of the policy; it looks for its settings on the model itself."""
    policy.peft_config = attached(policy).configs
    return get_peft_model_state_dict(policy, adapter_name=name)


def _residual(policy):
    """A bare policy with the weights that PiSSA left below its adapters."""
    other = make_policy()
    bases = {base_name(n): p for n, p in policy.named_parameters() if n not in adapter_tensors(policy)}
    other.load_state_dict(bases)
    return other


@torch.no_grad()
def _copy_projections(source, target) -> None:
    live = dict(target.named_parameters())
    for name, p in source.named_parameters():
        if "proj" in name.split(".")[0] or "action" in name.split(".")[0]:
            live[name].copy_(p)


def test_dora_from_factors_is_pefts_dora_in_outputs_and_gradients():
    torch.manual_seed(0)
    policy = make_policy()
    group = make_groups(apply_strategy(policy, rules("dora")).adapted)[0]
    torch.manual_seed(0)
    theirs = get_peft_model(make_policy(), peft_config(group), adapter_name="dora").base_model.model
    tensors = dict(policy.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():  # the same values, B no longer zero
            tensors[name].copy_(parameter.add_(0.05 * torch.randn_like(parameter)))
    assert any(isinstance(m, FactoredDoraLayer) for m in policy.modules())
    assert any(type(m) is DoraLinearLayer for m in theirs.modules())
    assert not any(isinstance(m, FactoredDoraLayer) for m in theirs.modules())
    # ROUNDINGS on ADAPTED_PATH in sums of TERMS: 2 * 2^-24 * sqrt(4 * 32 * 32) = 7.6e-6 of an output of 1; a
    # gradient passes three such paths: 1.3e-5 of the largest, which is below 1.
    torch.testing.assert_close(velocity(policy), velocity(theirs), atol=1e-5, rtol=1e-5)
    for each in (policy, theirs):
        enter_only_adapters(each)
        train(each, steps=1, lr=0.0)
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(tensors[name].grad, parameter.grad, atol=1e-5, rtol=1e-4)


def enter_only_adapters(policy) -> None:
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(name in adapter_tensors(policy))


def test_adalora_lowers_the_ranks_to_the_target_and_keeps_its_scores_through_an_interruption():
    policy, schedule = with_ranks(20)
    adalora_steps(policy, schedule, range(1, 11))
    kept = {k: v.clone() for k, v in schedule.state().items()}
    weights = {k: v.detach().clone() for k, v in policy.state_dict().items()}
    adalora_steps(policy, schedule, range(11, 21))
    ranks = schedule.ranks()
    assert sum(ranks.values()) == 2 * len(ranks) and max(ranks.values()) <= 4
    live = dict(policy.named_parameters())
    assert ranks == {layer: int((live[f"{layer}.lora_E.adalora"] != 0).sum()) for layer in ranks}
    again, other = with_ranks(20)
    again.load_state_dict(weights)
    other.load(kept)
    assert other.state().keys() == kept.keys()
    assert all(torch.equal(other.state()[k], v) for k, v in kept.items())
    with pytest.raises(TrainingError, match="AdaLoRA.*kept/expert"):
        other.load({k: v for k, v in kept.items() if not k.startswith("kept")})


def test_the_scores_of_adalora_are_pefts():
    policy, schedule = with_ranks(10)
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=10, tinit=1, tfinal=3, deltaT=1)
    theirs = RankAllocator(policy, config, "adalora")

    def look(step: int) -> None:
        if step < 10 - 3:
            theirs.update_ipt(policy)

    adalora_steps(policy, schedule, range(1, 7), look)
    for layer in schedule.ranks():
        for key in "ABE":
            ours = schedule.state()[f"sensitivity.{key}/{layer}"]
            torch.testing.assert_close(ours, theirs.exp_avg_ipt[f"{layer}.lora_{key}.adalora"])
            ours = schedule.state()[f"uncertainty.{key}/{layer}"]
            torch.testing.assert_close(ours, theirs.exp_avg_unc[f"{layer}.lora_{key}.adalora"])


def test_the_clock_of_adalora_goes_by_whichever_of_steps_and_time_is_further():
    clock = Clock(began=10, began_spent=0.2, ends=20, ends_spent=1.0)
    assert clock.done(15, 0.2) == 0.5 and clock.done(15, 0.8) == pytest.approx(0.75)
    assert Clock(10, 0.2, 20, math.inf).done(15, 0.9) == 0.5
    policy, schedule = with_ranks(10**6)
    spent = [n / 20 for n in range(20)] + [1.0]
    adalora_steps(policy, schedule, range(1, 22), spent=spent)  # a budget of time: the steps would never end
    assert sum(schedule.ranks().values()) == 2 * len(schedule.ranks())


def with_ranks(steps: int):
    policy = make_policy()
    plan = apply_strategy(policy, rules("adalora"))
    schedule = rank_schedule(policy, plan)
    assert schedule is not None
    schedule.enter(plan, steps=steps, step=0)
    return policy, schedule


def adalora_steps(policy, schedule, steps, look=lambda step: None, spent=None) -> None:
    optimiser = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-2)
    batch, noise, time = make_batch()
    for number, step in enumerate(steps):
        loss = policy.flow_loss(batch, noise, time)["loss"] + schedule.penalty()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        look(step)
        schedule.after_step(step, spent[number] if spent else 0.0)


def test_lora_plus_gives_b_a_learning_rate_of_its_own_and_nothing_else():
    policy = make_policy()
    plan = apply_strategy(
        policy,
        [
            {"select": {"part": "projections"}, "mode": "full"},
            {"select": {"kind": ["attention"]}, "mode": "lora", "rank": 2, "lr": 2, "lr_b": 16},
            REST,
        ],
    )
    rates = {n: g["lr"] for g in plan.groups(policy, OptimRecipe(lr=1.0)) for n in g["names"]}
    assert {r for n, r in rates.items() if ".lora_B." in n} == {32.0}
    assert {r for n, r in rates.items() if ".lora_A." in n} == {2.0}
    assert {r for n, r in rates.items() if "lora" not in n} == {1.0}


def test_scales_and_magnitudes_do_not_decay():
    for name, word in (("ia3", "ia3_l"), ("dora", "magnitude"), ("adalora", "lora_E")):
        plan = preview(make_policy(), strategy(*rules(name)))
        scales = [e for e in plan.entries if word in e.name]
        assert scales and not any(e.decays for e in scales)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            {"select": {"kind": "conv"}, "mode": "oft"},
            r"rule 1 \(conv; oft\).*patch_embedding.*: linear\..*conv: lora, dora",
        ),
        (
            {"select": {"kind": "embedding"}, "mode": "loha"},
            r"rule 1 .embedding; loha..*position_embedding.*: linear, conv.*embedding: lora, dora",
        ),
        (
            {"select": {"kind": "conv"}, "mode": "lora", "init": "pissa"},
            "patch_embedding.*lora with init = 'pissa'.*: linear",
        ),
        (
            {"select": {"part": "expert"}, "mode": "lora"},
            "expert.layers.0.input_layernorm.weight.*`kind`",
        ),
        (
            {"select": {"part": "vision", "kind": "mlp"}, "mode": "lora", "init": "pissa", "rank": 17},
            "fc1.weight .24, 16..*16 singular vectors.*`rank` 17",
        ),
        (
            {"select": {"kind": "conv"}, "mode": "frozen", "quantise": "nf4"},
            "only the linear layers of attention",
        ),
        ({"select": {"kind": "mlp"}, "mode": "lora", "rnak": 4}, "unknown key 'rnak'; did you mean 'rank'"),
        (
            {"select": {"kind": "mlp"}, "mode": "ia3", "rank": 4},
            "`rank`.* ia3.*no options",
        ),
        ({"select": {"kind": "mlp"}, "mode": "full", "rank": 4}, "`rank`.*mode 'full'"),
        ({"select": {"kind": "mlp"}, "mode": "lora", "rank": 0}, "`rank`.*at least 1, not 0"),
        ({"select": {"kind": "mlp"}, "mode": "lora", "rank": 2.5}, "`rank`.*whole number.*2.5"),
        ({"select": {"kind": "mlp"}, "mode": "lora", "alpha": float("nan")}, "`alpha`.*above 0.*nan"),
        (
            {"select": {"kind": "mlp"}, "mode": "lora", "dropout": 1},
            "`dropout`.*below 1, not 1",
        ),
        (
            {"select": {"kind": "mlp"}, "mode": "lora", "init": "pisa"},
            "unknown init 'pisa'; did you mean 'pissa'",
        ),
        (
            {"select": {"kind": "mlp"}, "mode": "adalora", "rank": 4, "target_rank": 4},
            "`rank` 4.*`target_rank` 4",
        ),
        ({"select": {"kind": "mlp"}, "mode": "dora", "quantise": "nf4"}, "`quantise`.*frozen or lora.*dora"),
        (
            {"select": {"kind": "mlp"}, "mode": "lora", "quantise": "nf5"},
            "unknown `quantise` 'nf5'; did you mean 'nf4'",
        ),
        (
            {"select": {"kind": "mlp"}, "mode": "lora", "quantise": "nf4", "init": "pissa"},
            "init = 'pissa'.*`quantise`",
        ),
    ],
)
def test_what_cannot_be_adapted_is_refused_with_what_can(rule: dict, message: str):
    policy = make_policy()
    before = [(n, p.requires_grad) for n, p in policy.named_parameters()]
    with pytest.raises(StrategyError, match=f"(?s){message}"):
        apply_strategy(policy, [rule, REST])
    assert [(n, p.requires_grad) for n, p in policy.named_parameters()] == before


def test_two_adaloras_with_other_options_are_refused_for_they_share_one_budget():
    first = {"select": {"part": "expert", "kind": "mlp"}, "mode": "adalora", "rank": 4, "target_rank": 2}
    second = {"select": {"part": "language", "kind": "mlp"}, "mode": "adalora", "rank": 6, "target_rank": 2}
    with pytest.raises(StrategyError, match="one budget"):
        preview(make_policy(), strategy(first, second, REST))


def test_a_policy_that_is_adapted_already_takes_no_second_strategy():
    policy = make_policy()
    apply_strategy(policy, rules("lora"))
    with pytest.raises(StrategyError, match="already has adapters.*vision.patch_embedding"):
        apply_strategy(policy, rules("dora"))


def test_a_policy_that_is_quantised_already_takes_no_second_strategy_until_it_is_merged():
    policy = make_policy()
    kinds = {"kind": ["attention", "mlp"]}
    apply_strategy(policy, [{"select": kinds, "mode": "frozen", "quantise": "int8"}, {"mode": "full"}])
    with pytest.raises(StrategyError, match=r"quantised.*down_proj and 48.*vlafit.merge"):
        apply_strategy(policy, "full")
    apply_strategy(vlafit.merge(policy), "full")


def test_a_strategy_without_adapters_replaces_the_one_before_it():
    policy = make_policy()
    apply_strategy(policy, "expert")
    plan = apply_strategy(policy, "projections")
    assert {n for n, p in policy.named_parameters() if p.requires_grad} == set(plan.trainable)
    apply_strategy(policy, rules("lora"))  # and adapters may follow


def test_merging_a_policy_without_adapters_leaves_it_as_it_is():
    policy = make_policy()
    plan = apply_strategy(policy, "expert")
    before = {n: p.detach().clone() for n, p in policy.named_parameters()}
    assert merge(policy) is policy
    assert {n for n, p in policy.named_parameters() if p.requires_grad} == set(plan.trainable)
    assert all(torch.equal(p, before[n]) for n, p in policy.named_parameters())


def test_a_merged_policy_carries_nothing_of_its_adapters():
    policy = make_policy()
    apply_strategy(policy, rules("pissa"))
    assert attached(policy).configs.keys() == {"lora"} and attached(policy).initial
    merge(policy)
    assert attached(policy) == Attached() and not hasattr(policy, "peft_config")


def test_a_strategy_is_a_name_a_path_or_rules_and_nothing_else(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text('[[rule]]\nselect = { part = "expert" }\nmode = "full"\n\n[[rule]]\nmode = "frozen"\n')
    plans = [apply_strategy(make_policy(), one) for one in (path, str(path))]
    assert plans[0] == plans[1] and plans[0].strategy.name == "mine"
    for odd in (None, 3, b"lora", {1, 2}, object()):
        policy = make_policy()
        with pytest.raises(StrategyError, match=r"strategy.*\(.*lora.*\).*path.*list of"):
            apply_strategy(policy, odd)


def test_a_rank_that_cannot_be_meant_or_made_is_refused_and_one_beyond_layers_is_told(caplog):
    big = {"select": {"kind": ["attention", "mlp"]}, "rank": 100_000}
    for mode in ("lora", "dora", "loha", "adalora", "miss"):
        with pytest.raises(StrategyError, match=r"`rank` 100000 .*\.weight .*at most \d+"):
            preview(make_policy(), strategy({**big, "mode": mode}, REST))
    with pytest.raises(StrategyError, match="`rank` 17 .*vision.* at most 16"):
        preview(make_policy(), strategy({**big, "mode": "miss", "rank": 17}, REST))
    assert not caplog.records
    preview(make_policy(), strategy({**big, "mode": "lora", "rank": 20}, REST))
    assert "`rank` 20" in caplog.text and "vision.layers.0.self_attn.q_proj" in caplog.text


def test_dead_layers_get_no_adapter():
    plan = preview(make_policy(), strategy(*rules("lora")))
    dead = {e.name for e in plan.entries if e.dead}
    assert dead and not any(e.adapts in dead for e in plan.entries)


def test_an_output_that_changes_when_adapters_are_put_in_is_an_error():
    policy, answers = make_policy(), iter([torch.ones(3), torch.ones(3) + 1e-3])
    with pytest.raises(StrategyError, match="changed the policy's output by 1.0e-03"):
        apply(policy, strategy(*rules("lora")), probe=lambda: next(answers))


def test_an_adapter_of_a_later_stage_is_there_from_the_start_and_learns_only_then():
    policy = make_policy()
    staged = parse(
        {
            "stage": [
                {"rule": [{"select": {"part": "projections"}, "mode": "full"}, REST]},
                {"begin": {"step": 5}, "rule": rules("lora")},
            ]
        },
        name="staged",
        where="test",
    )
    plan = apply(policy, staged, probe=probe(policy))
    assert {e.part for e in plan.entries if e.trainable} == {"projections"}
    assert any(e.adapts for e in plan.entries) and not any(e.adapts and e.trainable for e in plan.entries)
    enter(policy, plan.at(1))
    assert {base_name(n) for n, p in policy.named_parameters() if p.requires_grad} == set(
        plan.at(1).trainable
    )
    assert plan.at(1).at(0) == plan


def test_layer_by_layer_stages_are_written_out_from_the_top():
    staged = parse(
        {
            "stage": [
                {"rule": [{"select": {"part": "projections"}, "mode": "full"}, REST]},
                {
                    "name": "expert",
                    "begin": {"step": 10},
                    "layer_by_layer": 2,
                    "every": {"step": 5},
                    "rule": [{"select": {"part": "expert", "layers": "top"}, "mode": "full"}, REST],
                },
            ]
        },
        name="gradual",
        where="test",
    )
    written = preview(make_policy(), staged).strategy
    assert [(s.name, s.begin.step if s.begin else 0) for s in written.stages] == [
        ("", 0),
        ("expert, top 2", 10),
        ("expert, top 3", 15),
    ]
    assert parse_again(written) == written


def parse_again(written):
    from vlafit.tuning.strategy_toml import to_tables

    tables = to_tables(written)
    return parse(tables, name=str(tables.pop("name")), where="again")


@pytest.mark.parametrize("name", variants(["lora", "dora", "oft"], always=["dora"]))
def test_over_a_bfloat16_policy_adapters_are_float32_and_merge_with_one_rounding(name: str, tmp_path):
    policy = make_policy()
    plan = apply_strategy(policy, rules(name))
    train(policy)
    vlafit.save_checkpoint(policy, tmp_path / "c", plan=plan)
    half = vlafit.load_policy(tmp_path / "c", dtype="bfloat16")
    dtypes = {n: p.dtype for n, p in half.named_parameters()}
    assert all(dtypes[n] == torch.float32 for n in adapter_tensors(half))
    assert dtypes["expert.layers.0.mlp.up_proj.base_layer.weight"] == torch.bfloat16
    layers = dict(adapted_layers(half))
    bases = {layer: module.get_base_layer().weight.detach().clone() for layer, module in layers.items()}
    wide = _with_bases(vlafit.load_policy(tmp_path / "c", dtype="float32"), bases)
    before, calls = velocity(half), _linear_calls(half)
    end_to_end = drift(unit_roundoff(torch.bfloat16), ROUNDINGS * ADAPTED_PATH, before.abs().max())
    assert 0 < (before - velocity(policy)).abs().max() < end_to_end  # rounding only
    merged, exact = merge(half), merge(wide)
    assert merged.expert.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    for layer, base in bases.items():  # the sum in float32, rounded once: bit by bit
        weight = merged.get_parameter(f"{layer}.weight")
        assert torch.equal(weight, exact.get_parameter(f"{layer}.weight").to(base.dtype)), layer
    assert len(calls) > 40
    for layer, (x, y) in calls.items():  # each layer's outputs, within the roundings that both ways make
        assert (
            (merged.get_submodule(layer)(x) - y).float().abs() <= _layer_bound(merged, layer, bases, x)
        ).all(), layer
    assert (velocity(merged) - before).abs().max() < end_to_end


@torch.no_grad()
def _with_bases(policy, bases: dict[str, torch.Tensor]):
    """The policy with the weights below its adapters replaced by these values."""
    for layer, module in adapted_layers(policy):
        module.get_base_layer().weight.copy_(bases[layer])
    return policy


def _linear_calls(policy) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Input and output of every adapted bfloat16 linear layer, for the batch of `velocity`."""
    calls = {}

    def keep(layer: str):
        def hook(_module, inputs, output) -> None:
            calls[layer] = (inputs[0].detach().clone(), output.detach().clone())

        return hook

    linear = {n: m for n, m in adapted_layers(policy) if isinstance(m.get_base_layer(), torch.nn.Linear)}
    hooks = [module.register_forward_hook(keep(layer)) for layer, module in linear.items()]
    velocity(policy)
    for hook in hooks:
        hook.remove()
    return {layer: call for layer, call in calls.items() if call[1].dtype == torch.bfloat16}


def _layer_bound(merged, layer: str, bases: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Return how far rounding may move an output: roundings x unit x (|x| |w| + |bias|) (Cauchy-Schwarz)."""
    module = merged.get_submodule(layer)
    rows = torch.maximum(module.weight.float().norm(dim=1), bases[layer].float().norm(dim=1))  # [out]
    scale = x.float().norm(dim=-1, keepdim=True) * rows
    if module.bias is not None:
        scale = scale + module.bias.float().abs()
    return ROUNDINGS * unit_roundoff(torch.bfloat16) * scale


@pytest.mark.parametrize("name", variants(METHODS, always=["pissa", "oft"]))
def test_over_a_bfloat16_policy_an_adapter_is_an_exact_no_op_and_pissa_says_by_how_much_it_is_not(
    name: str, bfloat16: Path, caplog
):
    policy = vlafit.load_policy(bfloat16, dtype="bfloat16")
    before, weights = velocity(policy), {n: p.detach().clone() for n, p in policy.named_parameters()}
    plan = apply_strategy(policy, rules(name))
    if name != "pissa":
        assert torch.equal(velocity(policy), before) and not caplog.records
        return
    (record,) = [r for r in caplog.records if "PiSSA" in r.message]
    off = 0.0
    for layer in plan.adapted:
        module, weight = policy.get_submodule(layer), weights[f"{layer}.weight"].float()
        sum_ = module.get_base_layer().weight.float() + module.get_delta_weight("lora")
        off = max(off, float((sum_ - weight).abs().max() / weight.abs().max()))
    assert 0 < off < 2**-7 and f"up to {off:.1e}" in record.message  # a unit in bfloat16's last place
    drifted = (velocity(policy) - before).abs().max()  # the residual's rounding, then that of both ways
    assert drifted < min(
        0.1, drift(unit_roundoff(torch.bfloat16), ROUNDINGS * ADAPTED_PATH, before.abs().max())
    )


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to be loaded in bfloat16."""
    folder = tmp_path_factory.mktemp("bfloat16") / "c"
    vlafit.save_checkpoint(make_policy(), folder)
    return folder


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_a_quantised_tower_goes_with_a_projector_in_bfloat16(how: str, tmp_path):
    vlafit.save_checkpoint(make_policy(), tmp_path / "c")
    policy = vlafit.load_policy(tmp_path / "c", dtype="bfloat16")
    select = {"part": "vision", "kind": ["attention", "mlp"]}
    apply_strategy(policy, [{"select": select, "mode": "lora", "rank": 2, "quantise": how}, REST])
    assert velocity(policy).isfinite().all()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"select": {"part": "language"}, "mode": "oft"}, "oft"),
        (
            {"select": {"part": "expert", "kind": "mlp"}, "mode": "oft", "block": 1},
            "`block` from 2 to 1",
        ),
        ({"select": {"part": []}, "mode": "full"}, "`part`.*list.*not"),
    ],
)
def test_rules_that_could_turn_or_take_nothing_are_refused(rule: dict, message: str):
    with pytest.raises(StrategyError, match=message):
        preview(make_policy(), strategy(rule, REST))


def test_an_absurd_block_is_cut_to_the_layer_at_once():
    plan = preview(make_policy(), strategy({"select": {"part": "expert", "kind": "mlp"}, "mode": "oft",
                                            "block": 10**9}, REST))  # fmt: skip
    assert plan.trainable_parameters


def test_layer_by_layer_stages_that_would_begin_after_the_run_are_refused_at_once():
    top = {"select": {"part": "expert", "layers": "top"}, "mode": "full"}
    late = {"begin": {"fraction": 0.5}, "layer_by_layer": 1, "every": {"fraction": 0.4}, "rule": [top, REST]}
    first = {"rule": [{"select": {"part": "projections"}, "mode": "full"}, REST]}
    with pytest.raises(StrategyError, match="stage 4 .layers, top 3. .*130%"):
        preview(make_policy(), parse({"stage": [first, late]}, name="mine", where="mine"))
