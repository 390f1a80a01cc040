"""What is published is what was promised: the checkpoint that ships, the quickstart, the three starts."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from vlafit import checkpoints, config, files, score, shipped
from vlafit.checkpoints import model_card
from vlafit.checkpoints.formats import registry
from vlafit.compare import arm_record, stored
from vlafit.compare.judge import judge
from vlafit.recipe import Recipe
from vlafit.rollout import load_protocol
from vlafit.rollout.protocol import require_unseen
from vlafit.train import launch
from vlafit.train.preflight import check
from vlafit.train.settle import earlier, field_of, settle, with_field

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "eval" / "results"
STARTS = ("quickstart", "quickstart-fresh-expert", "quickstart-untrained")
CHECKPOINTS = shipped.names("checkpoint")
MADE_FOR = {  # checkpoint: the protocol of tasks to fine-tune it on, which it must not know
    "metaworld-base": "metaworld-faucet",
    "libero-object-base": "libero-object-unseen",
}
LATER = ("train.packing", "train.checkpoints", "data.workers")  # policy and machine decide


def facts(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def kept_recipe(folder: Path) -> Recipe:
    return config.read(Recipe, folder / "recipe.toml", "recipe")


# --------------------------------------------------------------------------------------- the checkpoint


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_shipped_checkpoint_is_whole_small_and_was_trained(name: str) -> None:
    folder = shipped.find("checkpoint", name)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 20e6
    loaded = checkpoints.load(folder)  # every file against its hash, every tensor filled
    assert loaded.codec is not None and loaded.plan is not None
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert max(steps) == kept_recipe(folder).train.steps == facts(folder / "run.json")["steps"]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_shipped_checkpoint_was_made_by_the_recipe_that_ships(name: str) -> None:
    kept = kept_recipe(shipped.find("checkpoint", name))
    recipe = config.read(Recipe, shipped.find("recipe", kept.name), "recipe")
    settled = settle(recipe, launch.read({}), bf16=False).recipe  # it was trained on a CPU
    was = earlier(kept)
    for field in LATER:
        settled = with_field(settled, field, field_of(was, field))
    assert replace(settled, eval=kept.eval) == was  # rollouts may be played later, by `vlafit eval`


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_shipped_checkpoint_tells_its_data_and_its_success_by_task(name: str) -> None:
    folder = shipped.find("checkpoint", name)
    (data,) = facts(folder / "data.json")
    assert len(data["record"]["tasks"]) >= 4
    assert set(data["sha256"]) == {f"{task}_demo.hdf5" for task in data["record"]["tasks"]}
    assert not set(load_protocol(MADE_FOR[name]).tasks) & set(data["record"]["tasks"])
    success = facts(folder / "success.json")
    assert set(success["tasks"]) == set(data["record"]["tasks"])
    assert f"sha256:{checkpoints.digest(folder)} " in success["actor"]  # played as it ships
    episodes = files.read_json_lines(folder / "episodes.jsonl")
    assert success["overall"]["successes"] == sum(episode["success"] is True for episode in episodes)
    for protocol in shipped.names("protocol"):
        require_unseen(load_protocol(protocol), None, checkpoints.read_lineage(folder).seeds)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_shipped_checkpoint_has_a_card_that_says_how_to_load_it(name: str) -> None:
    folder = shipped.find("checkpoint", name)
    text = (folder / "README.md").read_text(encoding="utf-8")
    front = re.match(r"---\n(.*?)\n---\n\n# ", text, re.DOTALL)
    assert front is not None
    assert {"library_name: vlafit", "pipeline_tag: robotics", "license: apache-2.0"} <= set(
        front[1].split("\n")
    )
    assert model_card.licence_of(name) == "apache-2.0"
    loaded = checkpoints.load(folder)
    made = model_card.card(loaded.policy, loaded.codec, holders=registry.holders(loaded.policy, loaded.codec))
    load = made[made.index("## Load") :].replace(model_card.PLACE, name)
    assert text.endswith(load) and "cannot hold it" in load
    (code,) = re.findall(r"```python\n(.*?)```", load, re.DOTALL)
    names: dict = {}
    exec(code, names)
    robot = names["actor"].embodiment
    seen = " and ".join(camera.name for camera in robot.cameras)
    height, width, _ = robot.cameras[0].shape
    facts_of_card = (
        f"| robot | {robot.name}, {robot.hz:g} Hz, control {robot.control}; "
        f"camera{'s' * (len(robot.cameras) > 1)} {seen}, {width}x{height}; "
    )
    assert facts_of_card + f"{robot.state.shape[0]} state and {robot.action.shape[0]} action" in text
    for task, one in facts(folder / "success.json")["tasks"].items():
        shown = task.removesuffix("-v3").replace("_", " ")
        assert f"| {shown} | {one['successes']}/{one['episodes']} |" in text


# ------------------------------------------------------------------------------------------ the results


@pytest.mark.parametrize(
    "folder",
    [
        "quickstart",
        *(f"quickstart-seeds/quickstart-seed{i}" for i in (1, 2)),
        *(f"pretraining/quickstart-seed{i}" for i in range(3)),
    ],
)
def test_the_quickstart_did_what_it_promises(folder: str) -> None:
    report = facts(RESULTS / folder / "report.json")
    if not folder.startswith(
        "pretraining/"
    ):  # those were judged from the starts on which the recipe was chosen
        played = {one["protocol_sha256"] for one in report["evaluations"].values()}
        assert played == {load_protocol("metaworld-faucet").sha256()}
    success = report["success"]
    assert success["before"]["rate"] <= 0.2 and success["wrong_instruction"]["rate"] <= 0.2
    assert success["after"]["rate"] >= 0.8
    for name, one in success.items():
        episodes = files.read_json_lines(RESULTS / folder / f"episodes_{name}.jsonl")
        assert one["episodes"] == len(episodes) >= 50 and one["errors"] == 0
        assert one["successes"] == sum(episode["success"] for episode in episodes)


def test_three_starts_were_compared_with_the_same_data_and_budget_in_three_seeds_each() -> None:
    for seed in range(3):
        recipes = [kept_recipe(RESULTS / "pretraining" / f"{start}-seed{seed}") for start in STARTS]
        one, *others = [(r.data, r.optim, r.strategy, r.train) for r in recipes]
        assert all(other == one for other in others) and one[3].seed == seed


def test_the_published_ablation_is_what_its_results_say() -> None:
    text = (ROOT / "eval" / "README.md").read_text(encoding="utf-8")
    results = facts(RESULTS / "pretraining" / "results.json")
    assert set(results) == set(STARTS)
    for start in STARTS:
        after = results[start]["after"]
        assert f"| `{start}` | {after['successes']} of {after['episodes']} |" in text


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("recipe.toml")), ids=lambda path: path.parent.name)
def test_a_published_recipe_can_be_run_again(path: Path) -> None:
    check(config.read(Recipe, path, "recipe"), processes=1)


@pytest.mark.parametrize("name", ["compare", "compare-fresh-expert", "compare-untrained"])
def test_a_published_comparison_is_what_its_episodes_say(name: str) -> None:
    folder = RESULTS / name
    comparison = stored.read(folder)
    counted = 0
    for record in comparison.records:
        figures = record.figures
        for path in sorted((folder / "arms" / record.name).glob("episodes_*.jsonl")):
            evaluation = path.stem.removeprefix("episodes_")
            rows = files.read_json_lines(path)
            assert figures is not None
            scores = figures.success[evaluation]
            assert score.by_task(tuple(scores), ((row["task"], row["success"]) for row in rows)) == scores
            listed = arm_record.outcomes_of((row["task"], row["seed"], row["success"]) for row in rows)
            assert figures.outcomes.get(evaluation, listed) == listed
            counted += len(rows)
    assert counted > 0
    verdict, written = judge(comparison.standings), facts(folder / "compare.json")["verdict"]
    assert [list(pair) for pair in verdict.better] == written["better"]
    assert (verdict.recommended, verdict.sentence) == (written["recommended"], written["sentence"])
