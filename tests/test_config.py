"""Recipes, cards and protocols as text: what is read, merged, refused and written."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlafit import config, shipped
from vlafit.errors import ConfigError
from vlafit.recipe import OptimRecipe, PolicyRecipe, Recipe


@dataclass(frozen=True)
class Leg:
    name: str
    length_m: float = 1.0


@dataclass(frozen=True)
class Animal:
    """A class with every kind of field that a config may have."""

    kind: Literal["dog", "cat"]
    legs: tuple[Leg, ...] = ()
    first: Leg = Leg("front")
    """The leg it starts with."""
    pair: tuple[int, str] = (1, "x")
    named: dict[str, Leg] = field(default_factory=dict)
    extra: dict[str, object] = field(default_factory=dict)
    age: int | None = None
    """Years;
    none if unknown."""
    home: Path = Path("here")
    tame: bool = False


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_every_supported_type_is_read(tmp_path):
    path = write(
        tmp_path,
        "a.toml",
        'kind = "dog"\nage = 3\nhome = "b/c"\ntame = true\npair = [2, "y"]\n'
        'extra = {a = [1, "b"], c = {d = 2.5}}\n[[legs]]\nname = "l"\nlength_m = 2\n[[legs]]\nname = "r"\n'
        '[named.tail]\nname = "t"\n[first]\nname = "f"\n',
    )
    assert config.read(Animal, path, "card") == Animal(
        kind="dog",
        legs=(Leg("l", 2.0), Leg("r")),
        first=Leg("f"),
        pair=(2, "y"),
        named={"tail": Leg("t")},
        extra={"a": [1, "b"], "c": {"d": 2.5}},
        age=3,
        home=Path("b/c"),
        tame=True,
    )


def test_a_whole_number_is_taken_where_a_number_is_asked():
    value = config.build(Leg, {"name": "l", "length_m": 2}, "here").length_m
    assert value == 2.0 and type(value) is float


@pytest.mark.parametrize("value", [Recipe(), Animal("cat"), Animal("cat", (Leg("a"), Leg("b", 1e-5)), age=1)])
def test_what_is_dumped_is_read_back_equal(tmp_path, value):
    path = write(tmp_path, "a.toml", config.dump(value))
    assert config.read(type(value), path, "recipe") == value


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
NUMBER = st.floats(allow_nan=False) | st.integers(-(2**63), 2**63 - 1)
PLAIN = st.recursive(
    TEXT | NUMBER | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


RATE = st.floats(-(2.0**62), 2.0**62)  # tests/test_bad_input_config.py: numbers from 2^63 on are refused


@given(st.dictionaries(TEXT, PLAIN, max_size=4), TEXT, st.lists(TEXT, max_size=3), RATE)
def test_any_recipe_survives_its_text(values, text, fresh, lr):
    import tomllib

    recipe = Recipe(
        purpose=text, policy=PolicyRecipe(config=values, fresh=tuple(fresh)), optim=OptimRecipe(lr=lr)
    )
    assert config.build(Recipe, tomllib.loads(config.dump(recipe)), "here") == recipe


def test_a_base_is_merged_below_the_file(tmp_path):
    write(tmp_path, "root.toml", 'name = "root"\n[optim]\nlr = 1.0\nema = 0.5\n[data]\ncards = ["a", "b"]\n')
    write(tmp_path, "middle.toml", 'base = "root"\n[optim]\nlr = 2.0\n')
    path = write(tmp_path, "leaf.toml", 'base = "middle.toml"\nname = "leaf"\n[data]\ncards = ["c"]\n')
    recipe = config.read(Recipe, path, "recipe")
    assert (recipe.name, recipe.optim.lr, recipe.optim.ema, recipe.data.cards) == ("leaf", 2.0, 0.5, ("c",))


def test_a_file_may_extend_the_shipped_one_of_its_own_name(tmp_path, monkeypatch):
    (tmp_path / "house/configs").mkdir(parents=True)
    write(tmp_path / "house/configs", "quick.toml", 'name = "shipped"\n[optim]\nlr = 3.0\n')
    monkeypatch.setattr(shipped, "roots", lambda: [tmp_path / "house"])
    path = write(tmp_path, "quick.toml", 'base = "quick"\nname = "mine"\n')
    recipe = config.read(Recipe, path, "recipe")
    assert (recipe.name, recipe.optim.lr) == ("mine", 3.0)


def test_the_docstring_below_a_field_is_its_help():
    assert config.field_help(Animal) == {
        "first": "The leg it starts with.",
        "age": "Years;\nnone if unknown.",
    }
    assert config.field_help(Recipe)["name"].startswith("Name of the run")


def test_every_field_of_the_recipe_has_help():
    import dataclasses

    for cls in (
        Recipe,
        *(f.default_factory for f in dataclasses.fields(Recipe) if callable(f.default_factory)),
    ):
        assert isinstance(cls, type)
        missing = {f.name for f in dataclasses.fields(cls)} - set(config.field_help(cls))
        assert missing <= {
            "policy",
            "data",
            "adapt",
            "optim",
            "train",
            "eval",
        }  # sections carry the help of their class
        assert cls.__doc__


def test_a_date_is_refused_where_anything_else_may_stand(tmp_path):
    path = write(tmp_path, "a.toml", "[policy.config]\nborn = 2020-01-01\n")
    with pytest.raises(ConfigError, match="policy.config.born: expected text, a number"):
        config.read(Recipe, path, "recipe")


def test_every_missing_key_is_named_in_one_error() -> None:
    @dataclass(frozen=True)
    class Widths:
        state_dim: int
        action_dim: int
        chunk: int = 4

    with pytest.raises(ConfigError, match=r"missing keys 'state_dim' .*'action_dim' \(a whole number\)$"):
        config.build(Widths, {}, "recipe")
    with pytest.raises(ConfigError, match=r"missing key 'action_dim' \(a whole number\)$"):
        config.build(Widths, {"state_dim": 3}, "recipe")
