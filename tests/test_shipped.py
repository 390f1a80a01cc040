"""Names of shipped files: a path first, then the checkout, then the copy in the wheel."""

from pathlib import Path

import pytest

from vlafit import shipped
from vlafit.errors import ConfigError


@pytest.fixture
def house(tmp_path, monkeypatch) -> Path:
    """Two roots with the same recipe in both, and an empty working folder."""
    for root in ("checkout", "wheel"):
        (tmp_path / root / "configs/strategies").mkdir(parents=True)
        (tmp_path / root / "configs/quick.toml").write_text(f'name = "{root}"')
        (tmp_path / root / "configs/strategies/full.toml").write_text("")
    (tmp_path / "wheel/configs/other.toml").write_text("")
    (tmp_path / "wheel/data/pretrained/base").mkdir(parents=True)
    (tmp_path / "wheel/data/pretrained/base/policy.json").write_text("{}")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(shipped, "roots", lambda: [tmp_path / "checkout", tmp_path / "wheel"])
    return tmp_path


def test_the_checkout_wins_over_the_wheel(house):
    assert shipped.find("recipe", "quick") == house / "checkout/configs/quick.toml"
    assert shipped.find("recipe", "other") == house / "wheel/configs/other.toml"


def test_a_path_that_exists_wins_over_a_name(house):
    Path("quick.toml").write_text("")
    assert shipped.find("recipe", "quick.toml") == Path("quick.toml")
    assert shipped.find("recipe", "quick") == house / "checkout/configs/quick.toml"


def test_a_folder_of_the_same_name_does_not_hide_a_recipe(house):
    Path("quick").mkdir()
    assert shipped.find("recipe", "quick") == house / "checkout/configs/quick.toml"


def test_the_path_inside_the_repository_works_from_anywhere(house):
    assert shipped.find("recipe", "configs/quick.toml") == house / "checkout/configs/quick.toml"


def test_names_lists_each_once_and_one_kind_alone(house):
    assert shipped.names("recipe") == ["other", "quick"]
    assert shipped.names("strategy") == ["full"]
    assert shipped.names("checkpoint") == ["base"]
    assert shipped.find("checkpoint", "base").is_dir()
    assert shipped.names("card") == []


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("recipe", "quik", "there is no recipe 'quik'; did you mean 'quick'?"),
        ("recipe", "zzz", "there is no recipe 'zzz'; it can be one of: other, quick"),
        (
            "recipe",
            "a/b/quik.toml",
            "; did you mean 'quick'?",
        ),
        ("recipe", "", "name of the recipe is empty"),
        ("card", "x", "there is no card 'x', and none ships with vlafit"),
        ("checkpoint", "bass", "did you mean 'base'?"),
        ("recipes", "x", "'recipes'; did you mean 'recipe'?"),
    ],
)
def test_a_name_that_is_not_there_gets_the_nearest(house, kind, name, message):
    with pytest.raises(ConfigError) as error:
        shipped.find(kind, name)
    assert message in str(error.value)


def test_the_error_of_a_relative_path_says_where_paths_start(house):
    Path("recipes").mkdir()
    Path("recipes/mine.toml").write_text("")
    with pytest.raises(ConfigError) as error:  # beside a recipe, as a recipe's `base` may be
        shipped.find("card", "./mine.toml")
    assert f"'./mine.toml' in the current directory, {house / 'work'}" in str(error.value)
    with pytest.raises(ConfigError) as error:
        shipped.find("card", "/x/mine.toml")
    assert "current directory" not in str(error.value)


def test_a_folder_where_a_file_is_asked_says_so(house):
    Path("mine").mkdir()
    with pytest.raises(ConfigError, match=r"'mine' is a folder.*recipe.*\.toml"):
        shipped.find("recipe", "mine")
    Path("weights").write_text("")
    with pytest.raises(ConfigError, match="'weights' is a file.*checkpoint.*folder"):
        shipped.find("checkpoint", "weights")
