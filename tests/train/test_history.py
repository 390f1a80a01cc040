"""What a run knows of its past: base, datasets, recorded seeds, renderers; and where that matters."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch

from tests.train.world import tiny
from vlafit import checkpoints, cli, config, report
from vlafit.actor import load_actor
from vlafit.errors import ConfigError, TrainingError, WeightsError
from vlafit.recipe import PolicyRecipe, Recipe
from vlafit.rollout import evaluate
from vlafit.train import run
from vlafit.train.data import open_data
from vlafit.train.experiment import build

CPU = torch.device("cpu")


def number(card: Path, first: int) -> None:
    """Give each episode of the dots a seed, as `vlafit record` does."""
    for path in sorted((card.parent / "dots").iterdir()):
        with h5py.File(path, "r+") as file:
            for place, group in enumerate(file["data"].values()):  # type: ignore[union-attr]
                group.attrs["seed"] = first + place


@pytest.fixture(scope="module")
def seeded(card: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dots, recorded from seeds 500 to 503."""
    copy = tmp_path_factory.mktemp("seeded") / "data"
    shutil.copytree(card.parent, copy)
    number(copy / card.name, 500)
    return copy / card.name


@pytest.fixture(scope="module")
def base(seeded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run on the dots."""
    out = tmp_path_factory.mktemp("base") / "run"
    run(tiny(seeded, train={"steps": 1, "validate_every": 0, "save_every": 0}), out)
    return out / "checkpoints" / "step_000001"


def further(base: Path, card: Path, **sections: Any) -> Recipe:
    """A recipe of one step from the checkpoint."""
    train = {"steps": 1, "validate_every": 0, "save_every": 0, **sections.pop("train", {})}
    recipe = tiny(card, train=train, **sections)
    return replace(recipe, policy=PolicyRecipe(checkpoint=str(base)))


def moved(card: Path, to: Path) -> Path:
    shutil.copytree(card.parent, to)
    return to / card.name


def test_a_checkpoint_says_what_it_learned_from(base: Path) -> None:
    history = checkpoints.read_lineage(base)
    (dots,) = history.datasets
    assert (history.base, dots.card, dots.episodes, dots.frames) == ("", "dots", 6, 60 - 6 - 7)
    assert dict(history.seeds) == {"left": (500, 501, 502, 503), "right": (500, 501, 502, 503)}
    assert history.complete and len(history.episodes) == 2 * 6  # states and actions of each


def test_the_seeds_of_the_base_are_those_of_what_is_fine_tuned_from_it(
    base: Path, seeded: Path, tmp_path: Path
) -> None:
    other = moved(seeded, tmp_path / "data")
    number(other, 600)
    run(further(base, other), tmp_path / "run")
    history = checkpoints.read_lineage(tmp_path / "run" / "checkpoints" / "step_000001")
    assert history.base == checkpoints.digest(base)
    assert history.seeds["left"] == (500, 501, 502, 503, 600, 601, 602, 603)


def test_held_out_episodes_that_the_base_learned_from_are_named(base: Path, seeded: Path) -> None:
    assert not any("has learned from" in text for text in build(further(base, seeded), CPU).warnings)
    other_split = further(base, seeded, train={"seed": 4})
    seen = set(open_data(other_split.data, 4).validation[0])
    seen -= set(open_data(other_split.data, 3).validation[0])
    (warning,) = [text for text in build(other_split, CPU).warnings if "has learned from" in text]
    assert f"card 'dots': checkpoint {str(base)!r} has learned from {len(seen)} of the 2 held-out" in warning
    assert min(seen, key=list(open_data(other_split.data, 4).validation[0]).index) in warning


@pytest.mark.parametrize("first", [497, 503])
def test_a_checkpoint_is_not_evaluated_from_starts_that_it_learned_from(
    base: Path, seeded: Path, tmp_path: Path, first: int
) -> None:
    toy = tmp_path / "toy.toml"
    text = (seeded.parent / "toy.toml").read_text()
    toy.write_text(
        text.replace("first_seed = 100", f"first_seed = {first}").replace("trials = 2", "trials = 4")
    )
    with pytest.raises(ConfigError, match="1 seeds.*'left' .*demonstrations"):
        evaluate(load_actor(base), toy, tmp_path / "eval", workers=1, videos=0)
    assert not (tmp_path / "eval").exists()


def test_a_run_that_will_evaluate_on_its_own_starts_is_refused_at_its_beginning(
    seeded: Path, tmp_path: Path
) -> None:
    """The protocol's two trials are fresh, but every_trials = 5 come to a recorded seed."""
    toy = tmp_path / "toy.toml"
    toy.write_text((seeded.parent / "toy.toml").read_text().replace("= 100", "= 496"))
    recipe = tiny(seeded, eval={"protocol": str(toy), "every": 4, "every_trials": 5})
    with pytest.raises(ConfigError, match=r"1 seeds of task 'left'"):
        run(recipe, tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_partners_with_one_sentence_are_refused_at_the_beginning(seeded: Path, tmp_path: Path) -> None:
    toy = tmp_path / "toy.toml"
    text = (seeded.parent / "toy.toml").read_text().replace('["left", "right"]', '["left", "left-again"]')
    toy.write_text(text.split("[swapped]")[0] + '[swapped]\nleft = "left-again"\n')
    recipe = tiny(seeded, eval={"protocol": str(toy), "wrong_instruction": True})
    with pytest.raises(ConfigError, match="'left' .*'left-again' .*same instruction"):
        run(recipe, tmp_path / "run")


def _state(group: h5py.Group) -> None:
    group["obs/at"][3, 0] += 0.01


def _action(group: h5py.Group) -> None:
    group["actions"][0, 1] += 0.01


def _sentence(group: h5py.Group) -> None:
    group.parent.attrs["problem_info"] = json.dumps({"language_instruction": "go to the side"})


@pytest.mark.parametrize("change", [_state, _action, _sentence])
def test_changed_data_is_other_data(base: Path, seeded: Path, tmp_path: Path, change: Any) -> None:
    card = moved(seeded, tmp_path / "data")
    recipe = tiny(card)
    before = open_data(recipe.data, 3).fingerprint
    assert before == open_data(tiny(seeded).data, 3).fingerprint  # wherever it lies
    with h5py.File(card.parent / "dots" / "left_demo.hdf5", "r+") as file:
        change(file["data/demo_1"])
    assert open_data(recipe.data, 3).fingerprint != before


def test_a_run_does_not_go_on_with_changed_actions(seeded: Path, tmp_path: Path) -> None:
    card = moved(seeded, tmp_path / "data")
    recipe, out = tiny(card), tmp_path / "run"
    run(recipe, out)
    shutil.rmtree(out / "checkpoints" / "step_000008")
    with h5py.File(card.parent / "dots" / "left_demo.hdf5", "r+") as file:
        _action(file["data/demo_1"])  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match="data changed since the run began"):
        run(recipe, out, resume=True)


def test_pictures_of_another_renderer_are_told_kept_and_reported(
    base: Path, seeded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = moved(seeded, tmp_path / "data")
    card.write_text(card.read_text().replace('renderer = "ray"', 'renderer = "egl"'))
    out = tmp_path / "run"
    (tmp_path / "recipe.toml").write_text(config.dump(further(base, card, train={"report": True})))
    assert cli.main(["train", str(tmp_path / "recipe.toml"), "--out", str(out)]) == 0
    told = (
        "the checkpoint was trained on images rendered by 'ray', the dataset shows images rendered by 'egl'"
    )
    assert told in capsys.readouterr().err
    codec = checkpoints.load(out / "checkpoints" / "step_000001").codec
    assert codec is not None and codec.embodiment.renderer == "egl"
    assert any(told in caveat for caveat in report.read_facts(out).caveats)
    assert told in (out / "report.html").read_text().replace("&#x27;", "'")


@pytest.mark.parametrize("statistics", ["checkpoint", "data"])
def test_a_foreign_renderer_is_told_with_fresh_statistics_too_and_not_forgotten_by_a_resumption(
    base: Path, seeded: Path, tmp_path: Path, statistics: str
) -> None:
    card = moved(seeded, tmp_path / "data")
    card.write_text(card.read_text().replace('renderer = "ray"', 'renderer = "egl"'))
    recipe = further(base, card, data={"statistics": statistics})
    (notice,) = build(recipe, CPU).warnings
    assert "rendered by 'ray', the dataset shows images rendered by 'egl'" in notice
    run(recipe, tmp_path / "run")
    run(recipe, tmp_path / "run", resume=True)
    assert notice in report.read_facts(tmp_path / "run").caveats


def test_the_report_pins_the_base_and_the_data(base: Path, seeded: Path, tmp_path: Path) -> None:
    run(further(base, seeded, train={"report": True}), tmp_path / "run")
    hashes = json.loads((tmp_path / "run" / "report.json").read_text())["sha256"]
    assert hashes["base checkpoint"] == checkpoints.digest(base)
    assert hashes["dataset dots"] == checkpoints.read_lineage(base).datasets[0].sha256
    page = (tmp_path / "run" / "report.html").read_text()
    assert hashes["base checkpoint"] in page and hashes["dataset dots"] in page


def test_a_changed_history_is_damage(base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    (copy / "history.json").write_text('{"format": 1}')
    with pytest.raises(WeightsError, match=r"changed: history\.json"):
        checkpoints.load(copy)
    (copy / "history.json").write_text('{"format": 1, "seeds": ')
    with pytest.raises(WeightsError, match=r"history\.json: cannot be read as JSON"):
        checkpoints.read_lineage(copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    content = (copy / "history.json").read_bytes()
    manifest["files"]["history.json"] = hashlib.sha256(content).hexdigest()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    for read in (checkpoints.load, checkpoints.inspect):
        with pytest.raises(WeightsError, match=r"history\.json: cannot be read as JSON"):
            read(copy)
