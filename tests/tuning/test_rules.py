"""The rules of a tuning strategy: what a rule takes, in which order, and what is refused."""

import json
from pathlib import Path

import pytest

from tests.tuning.toy import ToyPolicy
from vlafit.errors import ConfigError, StrategyError, VlafitError
from vlafit.nn.kinds import KINDS
from vlafit.tuning import Plan, load_strategy, parse, preview
from vlafit.tuning.rules import resolve

REST = {"mode": "frozen"}


def strategy(*rules: dict):
    return parse(rules, name="mine", where="test")


def taken(policy: ToyPolicy, select: dict) -> set[str]:
    """Names that one rule takes."""
    infos = policy.parts()
    return {
        i.name
        for i, r in zip(
            infos,
            resolve(infos, strategy({"select": select, "mode": "full"}, REST).rules, "mine"),
            strict=True,
        )
        if r == 0
    }


def test_the_first_rule_that_matches_decides(policy: ToyPolicy):
    rules = strategy(
        {"select": {"kind": "norm"}, "mode": "frozen"}, {"select": {"part": "expert"}, "mode": "full"}, REST
    )
    trained = preview(policy, rules).trainable
    assert "expert.0.mlp.weight" in trained
    assert "expert.0.norm.weight" not in trained


def test_part_kind_layers_and_pattern_must_all_hold(policy: ToyPolicy):
    assert taken(policy, {"part": "vision"}) == {"vision.weight", "vision.bias"}
    assert taken(policy, {"part": ["language", "expert"], "kind": "mlp", "layers": "0"}) == {
        f"{part}.0.mlp.{name}" for part in ("language", "expert") for name in ("weight", "bias")
    }
    assert taken(policy, {"kind": "embedding"}) == {"embed.weight"}
    assert taken(policy, {"part": "expert", "kind": "mlp", "layers": "1", "pattern": "*.weight"}) == {
        "expert.1.mlp.weight"
    }


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("first 1", {0}),
        ("last 2", {2, 3}),
        ("0", {0}),
        ("1-2", {1, 2}),
        ("last 4", {0, 1, 2, 3}),
        ("2-3", {2, 3}),
    ],
)
def test_a_layer_range_counts_from_zero_and_from_either_end(
    policy: ToyPolicy, layers: str, expected: set[int]
):
    names = taken(policy, {"part": "expert", "layers": layers})
    assert {int(n.split(".")[1]) for n in names} == expected


@pytest.mark.parametrize("layers", ["last 5", "first 99", "2-4", "4"])
def test_a_layer_range_past_the_last_layer_is_an_error_that_says_how_many_there_are(
    policy: ToyPolicy, layers: str
):
    with pytest.raises(
        StrategyError,
        match=f"'{layers}' goes past the 4|matches nothing.*expert 4|Layers there: expert 4",
    ):
        taken(policy, {"part": "expert", "layers": layers})


def test_a_layer_range_counts_in_each_part_for_itself_and_takes_nothing_that_is_in_no_layer(
    policy: ToyPolicy,
):
    names = taken(policy, {"layers": "last 1"})
    assert {n.split(".")[0] + n.split(".")[1] for n in names} == {"language2", "expert3"}


def test_a_pattern_stands_for_whole_names(policy: ToyPolicy):
    assert taken(policy, {"pattern": "actions.*"}) == {"actions.weight", "actions.bias"}
    with pytest.raises(StrategyError, match="matches nothing"):
        taken(policy, {"pattern": "actions"})


def test_an_uncovered_parameter_is_an_error_that_names_it(policy: ToyPolicy):
    with pytest.raises(StrategyError) as error:
        preview(policy, strategy({"select": {"part": ["expert", "language"]}, "mode": "full"}))
    assert "no rule for 6 of" in str(error.value)
    assert "vision, conv: 2 tensors, such as vision.weight" in str(error.value)
    assert 'mode = "frozen"' in str(error.value)


def test_a_rule_that_matches_nothing_is_an_error_that_says_what_there_is(policy: ToyPolicy):
    with pytest.raises(StrategyError, match=r"rule 1 \(vision, attention; full\) (.|\n)*Kinds there: conv"):
        preview(
            policy,
            strategy({"select": {"part": "vision", "kind": "attention"}, "mode": "full"}, {"mode": "full"}),
        )
    with pytest.raises(StrategyError, match="Layers there: expert 4"):
        preview(
            policy,
            strategy({"select": {"part": "expert", "layers": "7-9"}, "mode": "full"}, {"mode": "full"}),
        )
    with pytest.raises(StrategyError, match=r"The nearest names are 'actions\.weight'"):
        preview(policy, strategy({"select": {"pattern": "action.weight"}, "mode": "full"}, {"mode": "full"}))


def test_a_wholly_shadowed_rule_is_an_error_that_names_what_shadows_it(policy: ToyPolicy):
    rules = (
        {"select": {"part": "expert"}, "mode": "full"},
        {"select": {"part": "expert", "kind": "mlp"}, "mode": "frozen"},
        REST,
    )
    with pytest.raises(StrategyError, match=r"rule 2 \(expert, mlp; frozen\) .*rule 1 \(expert\)"):
        preview(policy, strategy(*rules))


@pytest.mark.parametrize(
    ("select", "says"),
    [
        (
            {"part": ["vision", "expert"], "kind": "attention"},
            ["part 'vision' has no", "attention", "there: conv"],
        ),
        (
            {"part": "expert", "kind": ["mlp", "conv"]},
            ["part 'expert' has no", "of kind conv", "attention, mlp, norm"],
        ),
        (
            {"pattern": ["expert.*", "langauge.*.mlp.wieght"]},
            ["pattern 'langauge.*.mlp.wieght' matches nothing", "names are 'language.2.mlp.weight'"],
        ),
        ({"pattern": ["expert.*", "xyz?"]}, ["pattern 'xyz?'", "the first is 'vision.weight'"]),
        (
            {"part": ["expert", "projections"], "layers": "last 2"},
            ["part 'projections'", "layers there: none"],
        ),
        ({"part": ["expert", "language"], "layers": "last 4"}, ["past the 3 layers that 'language' has"]),
        ({"layers": "2-4"}, ["'2-4'", "past the 4 layers"]),
    ],
)
def test_a_word_that_matches_nothing_beside_others_that_do_is_an_error(
    policy: ToyPolicy, select: dict, says: list[str]
):
    with pytest.raises(StrategyError) as error:
        preview(policy, strategy({"select": select, "mode": "full"}, REST))
    assert all(said in str(error.value) for said in ["strategy 'mine': rule 1", *says])
    preview(policy, strategy({"select": select, "mode": "full", "optional": True}, REST))


def test_all_rules_that_say_what_is_not_are_named_at_once(policy: ToyPolicy):
    rules = (
        {"select": {"part": ["vision", "expert"], "kind": ["attention", "embedding"]}, "mode": "full"},
        {"select": {"part": "projector", "kind": "mlp"}, "mode": "full"},
        REST,
    )
    with pytest.raises(StrategyError) as error:
        preview(policy, strategy(*rules))
    assert "part 'vision'" in str(error.value) and "kind embedding" in str(error.value)
    assert "rule 2 (projector, mlp; full) matches nothing" in str(error.value)


def test_a_plan_that_was_saved_with_an_empty_word_is_still_read(policy: ToyPolicy):
    select = {"part": ["vision", "expert"], "kind": "attention"}
    plan = preview(policy, strategy({"select": select, "mode": "full", "optional": True}, REST))
    text = plan.to_json().replace('"optional": true', '"optional": false')
    assert Plan.from_json(json.dumps(_without_false(json.loads(text)))).trainable == plan.trainable


def _without_false(values: dict) -> dict:
    values["strategy"]["rule"][0].pop("optional")
    return values


def test_top_layers_belong_to_stages_and_name_parts_that_have_layers(policy: ToyPolicy):
    with pytest.raises(StrategyError, match='rule 1: `layers = "top"` .*`layer_by_layer`.*"first 3"'):
        strategy({"select": {"part": "expert", "layers": "top"}, "mode": "full"}, REST)
    top = [{"select": {"part": ["language", "expert"], "layers": "top"}, "mode": "full"}, REST]
    staged = {"stage": [{"layer_by_layer": 2, "every": {"step": 5}, "rule": top}]}
    plan = preview(policy, parse(staged, name="mine", where="test"))
    assert [len(stage.rules) for stage in plan.strategy.stages] == [2, 3]
    assert [rule.select.layers for rule in plan.strategy.stages[1].rules] == ["last 3", "last 4", ""]
    top[0]["select"]["part"] = ["expert", "projections"]
    with pytest.raises(StrategyError, match="`layer_by_layer` finds no layers in projections"):
        preview(policy, parse(staged, name="mine", where="test"))


def test_optional_permits_a_rule_that_matches_nothing_and_one_that_is_shadowed(policy: ToyPolicy):
    rules = (
        {"select": {"part": "vision", "kind": "attention"}, "mode": "full", "optional": True},
        {"select": {"part": "expert"}, "mode": "full"},
        {"select": {"part": "expert", "kind": "mlp"}, "mode": "frozen", "optional": True},
        REST,
    )
    assert [row.tensors for row in preview(policy, strategy(*rules)).table][::2] == [0, 0]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"mode": "ful"}, "rule 1: unknown mode 'ful'; did you mean 'full'"),
        ({}, "`mode` is missing; it can be one of: full, frozen"),
        ({"mode": "full", "moed": 1}, "unknown key 'moed'; did you mean 'mode'"),
        ({"mode": "full", "select": {"prat": "vision"}}, "unknown key 'prat'; did you mean 'part'"),
        ({"mode": "full", "select": {"kind": "mpl"}}, "kind 'mpl'; did you mean 'mlp'"),
        ({"mode": "full", "select": {"part": 3}}, "`part` string list 3"),
        ({"mode": "full", "select": "vision"}, "`select` table 'vision'"),
        ({"mode": "full", "select": {"layers": "last"}}, "`layers` 'last' range"),
        ({"mode": "full", "select": {"layers": "7-4"}}, "`layers` '7-4' range"),
        ({"mode": "full", "select": {"layers": 4}}, "`layers` 4 range"),
        ({"mode": "full", "lr": "0.1"}, "`lr` at least 0 '0.1'"),
        ({"mode": "full", "lr": 0}, '`lr` above 0 mode = "frozen"'),
        ({"mode": "full", "lr": float("nan")}, "`lr` at least 0 nan"),
        ({"mode": "full", "lr": True}, "`lr` at least 0 True"),
        ({"mode": "full", "weight_decay": -1}, "`weight_decay` at least 0 -1"),
        ({"mode": "frozen", "lr": 0.1}, "`lr` frozen"),
        ({"mode": "full", "optional": "yes"}, "`optional` true false 'yes'"),
        ("full", "rule table 'full'"),
    ],
)
def test_a_bad_rule_is_refused_with_what_it_can_be(rule: dict, message: str):
    with pytest.raises(StrategyError) as error:
        strategy(rule)
    assert all(fact in str(error.value) for fact in ("test: rule 1", *message.split(" ")))


def test_any_part_name_is_read_and_the_policy_says_which_it_has(policy: ToyPolicy):
    prompts = strategy({"select": {"part": "soft_prompts"}, "mode": "full"}, REST)
    assert prompts.rules[0].select.part == ("soft_prompts",)
    with pytest.raises(StrategyError) as error:
        preview(policy, prompts)
    parts = ("expert", "language", "projections", "projector", "vision")
    assert all(fact in str(error.value) for fact in ("rule 1", "'soft_prompts'", *parts))
    with pytest.raises(StrategyError) as error:
        preview(policy, strategy({"select": {"part": ["expert", "visoin"]}, "mode": "full"}, REST))
    assert "'visoin'; did you mean 'vision'" in str(error.value)


def test_an_optional_rule_may_name_a_part_of_another_family_but_a_likely_typo_is_logged(
    policy: ToyPolicy, caplog: pytest.LogCaptureFixture
):
    def optional(part: str):
        return strategy({"select": {"part": part}, "mode": "full", "optional": True}, {"mode": "full"})

    assert preview(policy, optional("soft_prompts")).trainable and not caplog.records
    preview(policy, optional("visoin"))
    assert all(fact in caplog.text for fact in ("'mine'", "rule 1", "'visoin'", "'vision'"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the strategy has no rule"),
        ("rules = []", "unknown key 'rules'; did you mean 'rule'"),
        ('[rule]\nmode = "full"', "write each rule as [[rule]]"),
        ('purpose = 3\n[[rule]]\nmode = "full"', "`purpose` must be a string, not 3"),
        ("[[rule]\n", "TOML"),
    ],
)
def test_a_bad_strategy_file_is_refused_by_name(tmp_path: Path, text: str, message: str):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(VlafitError) as error:
        load_strategy(str(path))
    assert message in str(error.value)
    assert "mine.toml" in str(error.value)


def test_a_strategy_file_that_is_not_there_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean 'expert'"):
        load_strategy("expret")


def test_a_strategy_is_named_after_its_file(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text('purpose = "Everything."\n[[rule]]\nmode = "full"\n')
    loaded = load_strategy(str(path))
    assert (loaded.name, loaded.purpose, len(loaded.rules)) == ("mine", "Everything.", 1)


def test_a_rule_can_select_every_kind_that_a_parameter_can_have():
    rules = strategy(*({"select": {"kind": kind}, "mode": "full"} for kind in KINDS), REST).rules
    assert [rule.select.kind for rule in rules[:-1]] == [(kind,) for kind in KINDS]


def test_a_rule_for_everything_else_may_find_nothing_left_but_not_after_another_one(
    policy: ToyPolicy, caplog: pytest.LogCaptureFixture
):
    infos = policy.parts()
    parts = sorted({info.part for info in infos})
    named, rest = {"select": {"part": parts}, "mode": "full", "lr": 0.1}, {"mode": "full"}
    with caplog.at_level("INFO"):
        assert set(resolve(infos, strategy(named, rest).rules, "mine")) == {0}
    assert "rule 2 (everything else; full) finds nothing left" in caplog.text
    for first in (REST, rest):
        with pytest.raises(StrategyError, match="rule 2 .* is never used"):
            resolve(infos, strategy(first, rest).rules, "mine")
    missing = {"select": {"part": [*parts, "film"]}, "mode": "full"}
    with pytest.raises(StrategyError, match="no part 'film'"):
        resolve(infos, strategy(missing, rest).rules, "mine")
