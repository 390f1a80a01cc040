"""On a CPU a large policy is compared with the free memory before it is loaded; a small one is not."""

from pathlib import Path

import pytest

from tests.train.world import tiny
from tests.tuning.world import make_policy, rules
from vlafit import checkpoints
from vlafit.errors import ConfigError
from vlafit.recipe import PolicyRecipe, Recipe
from vlafit.train import fit, run
from vlafit.tuning import apply_strategy


@pytest.mark.case(
    section="machines",
    report="a run is killed after minutes, or the machine stops",
    user_has="a large checkpoint, and a CPU whose free memory it does not fit",
    now="refused before anything is loaded, with settings that fit",
)
def test_a_large_policy_is_compared_with_the_free_ram_of_a_cpu(
    card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny(card, train={"steps": 1, "save_every": 0, "validate_every": 0})
    assert not fit.is_large(recipe)
    monkeypatch.setattr(fit, "LARGE", 1000)  # bytes, as if this were a large one
    monkeypatch.setattr(fit, "free_bytes", lambda: 4 * 10**5)
    with pytest.raises(ConfigError, match=r"does not fit the free RAM: forecast .*--train\.memory ignore"):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.toml").exists()


def test_how_large_a_checkpoint_is_includes_what_it_sits_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, light = tmp_path / "base", tmp_path / "light"
    checkpoints.save(make_policy(), base)
    policy = checkpoints.load_policy(base)
    plan = apply_strategy(policy, [*rules("lora")[1:2], {"mode": "frozen"}])
    checkpoints.save(policy, light, plan=plan, base=base)
    monkeypatch.setattr(fit, "LARGE", (base / "model.safetensors").stat().st_size - 1)
    assert fit.is_large(Recipe(policy=PolicyRecipe(checkpoint=str(light))))
    monkeypatch.setattr(fit, "LARGE", 10**9)
    assert not fit.is_large(Recipe(policy=PolicyRecipe(checkpoint=str(light))))
