"""`vlafit train RECIPE` with any field of the recipe on the command line."""

from pathlib import Path

import pytest

from tests.train.world import write_dots
from vlafit import cli, config
from vlafit.cli.recipes import read_recipe, without
from vlafit.cli.verbs.train import read
from vlafit.errors import ConfigError
from vlafit.recipe import Recipe

RECIPE = """
name = "small"
[policy]
family = "pi0"
[policy.config]
chunk = 4
[policy.config.vision]
depth = 2
[data]
cards = ["a"]
[optim]
lr = 1e-3
"""


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(RECIPE)
    return path


def train(path: Path, *words: str) -> Recipe:
    return read([str(path), *words])[0]


@pytest.mark.parametrize("words", [["action.gripper", "state.0"], ['["action.gripper", "state.0"]']])
def test_a_list_is_given_as_words_or_as_in_toml(path: Path, words: list[str]):
    assert train(path, "--adapt.outside", *words).adapt.outside == ("action.gripper", "state.0")


def test_without_options_the_recipe_is_the_file(path):
    assert train(path) == config.read(Recipe, path, "recipe")


def test_any_field_can_be_overridden(path):
    recipe = train(
        path,
        *("--name", "other", "--optim.lr", "1e-4", "--optim.ema=0.99", "--train.steps", "7"),
        *(
            "--train.keep_best",
            "false",
            "--data.cards",
            "b",
            "c",
            "--train.trackers",
            "--data.statistics",
            "data",
        ),
        *("--eval.before", "true", "--strategy", "expert"),
    )
    assert recipe.name == "other" and recipe.strategy == "expert"
    assert recipe.optim.lr == 1e-4 and recipe.optim.ema == 0.99
    assert recipe.train.steps == 7 and recipe.train.keep_best is False and recipe.train.trackers == ()
    assert recipe.data.cards == ("b", "c") and recipe.data.statistics == "data"
    assert recipe.eval.before is True


def test_dashes_are_as_good_as_underscores(path):
    assert train(path, "--train.batch-size", "8", "--data.shift-pixels=2").train.batch_size == 8


def test_fields_of_the_model_are_merged_into_those_of_the_file(path):
    recipe = train(
        path,
        *("--policy.config.vision.heads", "4", "--policy.config.pi05=true", "--policy.config.note", "hello"),
        *("--policy.config.sizes", "[1, 2]"),
    )
    assert recipe.policy.config == {
        "chunk": 4,
        "vision": {"depth": 2, "heads": 4},
        "pi05": True,
        "note": "hello",
        "sizes": [1, 2],
    }


def test_a_negative_number_is_a_value(path):
    assert train(path, "--optim.lr", "-1").optim.lr == -1


def test_the_run_folder_and_resume_are_no_fields(path):
    _, options = read([str(path), "--out", "x", "--resume"])
    assert options.out == "x" and options.resume
    _, options = read([str(path)])
    assert options.out is None and not options.resume


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optim.lrr", "1"], "there is no option '--optim.lrr'; did you mean '--optim.lr'?"),
        (["--lr", "1"], "there is no option '--lr'; did you mean '--optim.lr'?"),
        (["--optim.lr", "fast"], "command line: optim.lr: expected a number, got 'fast'"),
        (["--train.steps", "1.5"], "command line: train.steps: expected a whole number, got '1.5'"),
        (
            ["--train.keep_best", "maybe"],
            "command line: train.keep_best: expected true or false, got 'maybe'",
        ),
        (
            ["--train.precision", "bf61"],
            "command line: train.precision: 'bf61' is not one of 'auto', 'fp32', 'bf16'",
        ),
        (["--optim.lr"], "argument --optim.lr: expected one argument"),
        (["--policy.config.chunk"], "option '--policy.config.chunk' needs a value"),
        (
            ["--policy.config.vision", "3", "--policy.config.vision.depth", "2"],
            "--policy.config.vision.depth: vision is a table",
        ),
        (["more"], "unexpected argument 'more'"),
    ],
)
def test_a_bad_option_says_what_is_wrong(path, words, message):
    with pytest.raises(ConfigError) as error:
        train(path, *words)
    assert message in str(error.value)


def test_the_recipe_comes_first(path):
    with pytest.raises(ConfigError, match="the recipe comes first"):
        read(["--optim.lr", "1", str(path)])
    with pytest.raises(ConfigError, match="no recipe given"):
        read([])


def test_help_shows_every_field_and_the_recipes_own_values(path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", str(path), "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--optim.lr NUMBER Peak learning rate. [0.001]" in shown
    for name in config.field_help(Recipe):
        assert f"--{name}" in shown
    for section in ("policy", "data", "optim", "train", "eval"):
        for name in config.field_help(type(getattr(Recipe(), section))):
            assert f"--{section}.{name}" in shown


def test_a_mistake_in_the_file_names_the_file(path):
    path.write_text(RECIPE + "beta3 = 1\n")
    with pytest.raises(ConfigError, match=r"small\.toml: .*'beta3'.*\[optim\].*did you mean"):
        train(path)


@pytest.mark.parametrize(
    "words",
    [
        ["--strategy", "full", "--strategy", "expert"],
        ["--out", "a", "--out=b"],
        ["--optim.warmup-steps", "1", "--optim.warmup_steps", "2"],
        ["--policy.config.chunk", "2", "--policy.config.chunk", "2"],
        ["--train.trackers", "--train.trackers", "tensorboard"],
    ],
)
def test_an_option_that_is_given_twice_is_refused(path, words):
    name = words[0].replace("-steps", "_steps")
    with pytest.raises(ConfigError, match=f"^{name} .* 2 times"):
        train(path, *words)


def test_a_value_that_reads_like_another_and_an_option_that_collects_are_given_as_often_as_wanted(
    path, capsys
):
    assert train(path, "--purpose", "strategy", "--strategy", "strategy").strategy == "strategy"
    words = ["inspect", "no-such", "--config", "a=1", "--config", "b=2"]
    assert cli.main(words) == 2 and "there is no checkpoint" in capsys.readouterr().err


def test_a_command_line_without_an_option_is_the_rest():
    words = ["x", "--workers", "2", "--out", "a", "--workers=3"]
    assert without(words, "--workers") == ["x", "--out", "a"]


@pytest.mark.parametrize("verb", ["train", "compare"])
def test_a_data_card_in_place_of_the_recipe_is_named_as_such(verb: str, tmp_path: Path):
    card = write_dots(tmp_path)
    with pytest.raises(ConfigError) as error:
        read_recipe(verb, "", "", [str(card)], lambda parser: None)
    for word in (str(card), "data card", f"--data.cards {card}"):
        assert word in str(error.value)
