"""Bad config files, and the message that each gives: what, where, how to mend it."""

import pytest

from vlafit import config
from vlafit.errors import ConfigError
from vlafit.recipe import Recipe

BAD_RECIPES = {
    "not TOML": ("name = ", "{path}: not valid TOML: Invalid value (at end of document)"),
    "a key twice": ("name = 'a'\nname = 'b'", "{path}: not valid TOML: Cannot overwrite a value"),
    "an unknown key": ("nmae = 'x'", "{path}: unknown key 'nmae'; did you mean 'name'?"),
    "an unknown key in a section": (
        "[optim]\nlearning_rate = 1",
        "{path}: unknown key 'learning_rate' in [optim]; it can be one of: beta1, beta2, clip_norm",
    ),
    "an unknown section": ("[opt]\nlr = 1", "{path}: unknown key 'opt'; did you mean 'optim'?"),
    "text for a number": ("[optim]\nlr = '5e-5'", "{path}: optim.lr: expected a number, got '5e-5'"),
    "a number for text": ("name = 3", "{path}: name: expected text, got 3"),
    "a fraction for a whole number": (
        "[train]\nsteps = 1.5",
        "{path}: train.steps: expected a whole number, got 1.5",
    ),
    "a boolean for a number": (
        "[train]\nsteps = true",
        "{path}: train.steps: expected a whole number, got True",
    ),
    "a number for a boolean": (
        "[train]\nkeep_best = 1",
        "{path}: train.keep_best: expected true or false, got 1",
    ),
    "a number beyond any use": (
        "[optim]\nlr = 1e30",
        "{path}: optim.lr: expected a number below 2^63, got 1e+30",
    ),
    "no end": ("[optim]\nlr = inf", "{path}: optim.lr: expected a number below 2^63, got inf"),
    "not a number": ("[optim]\nlr = nan", "{path}: optim.lr: expected a number below 2^63, got nan"),
    "none of the choices": (
        "[train]\nprecision = 'fp23'",
        "{path}: train.precision: 'fp23' is not one of 'auto', 'fp32', 'bf16'; did you mean 'fp32'?",
    ),
    "text for a list": ("[data]\ncards = 'libero'", "{path}: data.cards: expected a list, got 'libero'"),
    "a number in a list of text": ("[data]\ncards = ['a', 1]", "{path}: data.cards[1]: expected text, got 1"),
    "a value for a section": ("optim = 3", "{path}: optim: expected a table, got 3"),
    "a list for a section": ("[[optim]]\nlr = 1", "{path}: optim: expected a table, got [{{'lr': 1}}]"),
    "a value for a free table": ("[policy]\nconfig = 3", "{path}: policy.config: expected a table, got 3"),
    "a date": (
        "[policy.config]\nborn = 2020-01-01",
        "{path}: policy.config.born: expected text, a number, a boolean, a list or a table, got datetime",
    ),
    "a base that is not there": (
        "base = 'no-such-recipe'",
        "{path}: base: there is no recipe 'no-such-recipe'",
    ),
    "two bases": (
        "base = ['a', 'b']",
        "{path}: base: expected the name or path of one recipe, got ['a'",
    ),
    "an empty base": ("base = ''", "{path}: base: expected the name or path of one recipe, got ''"),
}


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_a_bad_recipe_gives_its_message(tmp_path, case):
    text, message = BAD_RECIPES[case]
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        config.read(Recipe, path, "recipe")
    assert str(error.value).startswith(message.format(path=path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.toml: no such file"):
        config.read(Recipe, tmp_path / "gone.toml", "recipe")


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: .*a folder"):
        config.read(Recipe, tmp_path, "recipe")


def test_a_binary_file_is_no_recipe(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_bytes(b"name = '\xff'")
    with pytest.raises(ConfigError, match=r"bad\.toml: .*UTF-8.*byte 8"):
        config.read(Recipe, path, "recipe")


def test_bases_in_a_circle_are_shown(tmp_path):
    for name, base in (("a", "b"), ("b", "c"), ("c", "a")):
        (tmp_path / f"{name}.toml").write_text(f"base = '{base}'\n")
    with pytest.raises(ConfigError) as error:
        config.read(Recipe, tmp_path / "a.toml", "recipe")
    circle = " -> ".join(str(tmp_path / f"{name}.toml") for name in "abca")
    assert str(error.value).startswith(f"{tmp_path}/a.toml: circular base files: {circle}")


def test_a_mistake_in_a_base_is_reported(tmp_path):
    (tmp_path / "base.toml").write_text("base = 'nowhere'\n")
    (tmp_path / "top.toml").write_text("base = 'base'\n")
    with pytest.raises(ConfigError, match=r"base\.toml: base: .*'nowhere'"):
        config.read(Recipe, tmp_path / "top.toml", "recipe")


def test_what_toml_cannot_hold_is_refused_when_written():
    from vlafit.recipe import OptimRecipe

    with pytest.raises(ConfigError, match="nan cannot be written as TOML"):
        config.dump(Recipe(optim=OptimRecipe(lr=float("nan"))))
