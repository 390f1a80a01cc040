"""A count that is a slip of the keyboard is refused by its name, before anything is opened or written."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vlafit import shipped
from vlafit.datasets import load_card
from vlafit.datasets.card_check import check as check_card
from vlafit.errors import ConfigError
from vlafit.offline import Settings
from vlafit.recipe import Recipe
from vlafit.rollout import load_protocol
from vlafit.sweep.study import Dimension, Study
from vlafit.train.preflight import AT_LEAST_ONE, NOT_NEGATIVE
from vlafit.train.preflight import check as check_recipe

FAR = 10**12


@pytest.mark.case(
    section="machines",
    report="out of memory, or no sign of life, after a long start",
    user_has="`train.draws = 1e12`, a batch of 10^12, 10^9 workers",
    now="refused by the field's name before anything is opened",
)
@pytest.mark.parametrize("name", [n for n in (*AT_LEAST_ONE, *NOT_NEGATIVE) if n != "train.seed"])
def test_every_count_of_a_recipe_has_a_limit(name: str) -> None:
    section, field = name.split(".")
    recipe = Recipe()
    check_recipe(recipe, 1)
    wrong = replace(recipe, **{section: replace(getattr(recipe, section), **{field: FAR})})
    with pytest.raises(ConfigError, match=rf"{name}.*(at most|far above)|{FAR}"):
        check_recipe(wrong, 1)


@pytest.mark.parametrize("name", ["trials", "horizon", "replan", "width", "settle_steps", "start_steps"])
def test_every_count_of_a_protocol_has_a_limit(name: str) -> None:
    protocol = load_protocol(shipped.find("protocol", "metaworld-faucet"))
    changes: dict[str, Any] = {name: FAR, "horizon": 10**6} if name == "replan" else {name: FAR}
    with pytest.raises(ConfigError, match=f"{name}: must "):
        replace(protocol, **changes)


def camera(card: Any, **changes: int) -> Any:
    first, *others = card.robot.cameras
    return replace(card, robot=replace(card.robot, cameras=(replace(first, **changes), *others)))


CARDS: dict[str, Callable[[Any], Any]] = {
    "pixels": lambda card: camera(card, height=FAR),
    "16384": lambda card: camera(card, width=FAR),
    "state.dimensions": lambda card: replace(
        card, robot=replace(card.robot, state=replace(card.robot.state, dimensions=FAR, labels=()))
    ),
    "episodes_per_task": lambda card: replace(card, record=replace(card.record, episodes_per_task=FAR)),
    "horizon": lambda card: replace(card, record=replace(card.record, horizon=FAR)),
}


@pytest.mark.parametrize("fact", list(CARDS))
def test_every_count_of_a_card_has_a_limit(fact: str) -> None:
    card = load_card(shipped.find("card", "metaworld-faucet"))
    check_card(card, "card.toml")
    with pytest.raises(ConfigError, match=rf"card\.toml.*{fact}"):
        check_card(CARDS[fact](card), "card.toml")


def test_other_counts_have_a_limit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="draws must be at most"):
        Settings(draws=FAR)
    with pytest.raises(ConfigError, match="trials must be at most"):
        Study({"optim.lr": Dimension(low=1e-4, high=1e-2)}, trials=FAR)
