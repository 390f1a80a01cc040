"""What a comparison or sweep is known by."""

from dataclasses import asdict, replace

from vlafit.compare.identity import ADDED, digest, flat
from vlafit.recipe import OptimRecipe, Recipe


def test_fields_that_are_younger_than_a_folder_change_its_identity_only_when_used():
    unused = flat(asdict(Recipe()), ())
    assert not ADDED.keys() & unused.keys()
    used = flat(asdict(replace(Recipe(), optim=OptimRecipe(schedule_steps=5))), ())
    assert used == unused | {"optim.schedule_steps": 5} and digest(used) != digest(unused)
