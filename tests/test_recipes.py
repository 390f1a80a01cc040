"""Every recipe that ships can be carried out: all that it names is there and fits together."""

import pytest
import torch

from vlafit import config, shipped
from vlafit.checkpoints import load
from vlafit.datasets import load_card
from vlafit.nn.policy import Policy
from vlafit.policies import family, override
from vlafit.recipe import Recipe
from vlafit.record.workers import ATTEMPTS
from vlafit.rollout import load_protocol
from vlafit.rollout.protocol import require_unseen
from vlafit.tuning import load_strategy, preview

RECIPES = shipped.names("recipe")


def recipe_of(name: str) -> Recipe:
    return config.read(Recipe, shipped.find("recipe", name), "recipe")


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_finds_its_cards_and_its_protocol(name: str):
    recipe = recipe_of(name)
    assert recipe.name == name
    assert recipe.data.cards
    for card in recipe.data.cards:
        load_card(card)
    if recipe.eval.protocol:
        load_protocol(recipe.eval.protocol)


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_is_judged_from_starts_that_its_cards_do_not_record(name: str):
    recipe = recipe_of(name)
    assert recipe.eval.protocol
    for card in (load_card(one) for one in recipe.data.cards):
        assert card.record is not None
        most = ATTEMPTS * card.record.episodes_per_task + 10  # the recorder gives up after so many starts
        seeds = range(card.record.first_seed, card.record.first_seed + most)
        require_unseen(load_protocol(recipe.eval.protocol), None, dict.fromkeys(card.record.tasks, seeds))


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_builds_its_policy_and_its_strategy_covers_it(name: str):
    recipe = recipe_of(name)
    plan = preview(policy_of(recipe), load_strategy(recipe.strategy))
    assert plan.trainable_parameters > 0


def policy_of(recipe: Recipe) -> Policy:
    """The recipe's policy: from its checkpoint, or on the meta device from its size."""
    spec = recipe.policy
    if spec.checkpoint:
        if not shipped.names("checkpoint"):
            pytest.skip("no checkpoint ships yet")
        folder = shipped.find("checkpoint", spec.checkpoint)
        return load(folder, config=spec.config or None, fresh=spec.fresh).policy
    module = family(spec.family)
    with torch.device("meta"):
        return module.build(override(module.SIZES[spec.size], spec.config, "recipe"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_is_short_and_its_header_says_command_hardware_and_result(name: str):
    text = shipped.find("recipe", name).read_text(encoding="utf-8")
    header = text[: text.index("\n", text.rindex("\n#", 0, text.index("name =")) + 1)]
    assert len(text.splitlines()) < 50
    for word in ("command:", "hardware:", "result:"):
        assert word in header
