"""One policy for two robots: other dimensions, cameras, units and rates in one run."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from tests.train.world import assert_same, learned, losses, metrics, tiny, write_dots
from vlafit import config
from vlafit.actor import load_actor
from vlafit.checkpoints.export import export
from vlafit.cli import main
from vlafit.codec import CodecSet, Statistics
from vlafit.datasets import ChunkDataset
from vlafit.errors import ConfigError, EmbodimentError, VlafitError, WeightsError
from vlafit.recipe import AdaptRecipe, Recipe
from vlafit.train import preflight, run
from vlafit.train.data import open_data
from vlafit.train.dataloader import order_of, rows_of, training_batches
from vlafit.train.experiment import Experiment, build
from vlafit.types import EpisodeKey, Observation

CPU = torch.device("cpu")
GROOT = Path(__file__).parents[1] / "fixtures" / "lerobot_groot"
HAND = """
name = "grasps"
layout = "libero"
path = "grasps"

[instruction]
source = "attrs"

[robot]
name = "five-finger-hand"
hz = 30.0
control = "joint_position"
renderer = "camera"
state = { keys = ["obs/joints"], dimensions = 5, unit = "deg" }
action = { keys = ["actions"], dimensions = 4, unit = "deg" }

[[robot.cameras]]
name = "palm"
key = "obs/palm"
height = 16
width = 16

[[robot.cameras]]
name = "head"
key = "obs/head"
height = 20
width = 24
"""
NAMES = {"dots": "dot", "grasps": "hand"}
SLOTS = {"hand": AdaptRecipe(cameras={"front": "head"})}


def write_grasps(folder: Path, episodes: int = 4) -> Path:
    """Write recordings of a hand of five joints in degrees, seen by two cameras, and return their card."""
    rng = np.random.default_rng(9)
    (folder / "grasps").mkdir(parents=True)
    with h5py.File(folder / "grasps" / "close_demo.hdf5", "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": "close the hand"})
        for number in range(episodes):
            length = 7 + number
            joints = 40 + np.cumsum(rng.normal(0, 6, (length, 5)), axis=0)
            group = data.create_group(f"demo_{number}")
            group.create_dataset("actions", data=(joints[:, :4] + 5).astype(np.float32))
            group.create_dataset("obs/joints", data=joints.astype(np.float32))
            for camera, shape in (("palm", (16, 16, 3)), ("head", (20, 24, 3))):
                images = rng.integers(0, 256, (length, *shape), dtype=np.uint8)
                group.create_dataset(f"obs/{camera}", data=images)
    (folder / "grasps.toml").write_text(HAND)
    return folder / "grasps.toml"


@pytest.fixture(scope="module")
def hand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_grasps(tmp_path_factory.mktemp("hand"))


def both(card: Path, hand: Path, **sections: dict[str, Any]) -> Recipe:
    """A recipe of four steps on both robots; three of four samples are of the dots."""
    data = {
        "cards": (str(card), str(hand)),
        "embodiments": NAMES,
        "weights": {"dots": 3.0, "grasps": 1.0},
        **sections.pop("data", {}),
    }
    train = {"steps": 4, "save_every": 2, "keep": 3, "validate_every": 2, **sections.pop("train", {})}
    adapt = {"embodiments": SLOTS, **sections.pop("adapt", {})}
    return tiny(card, data=data, train=train, adapt=adapt, **sections)


@pytest.fixture(scope="module")
def recipe_of_both(card: Path, hand: Path) -> Recipe:
    return both(card, hand)


@pytest.fixture(scope="module")
def experiment(recipe_of_both: Recipe) -> Experiment:
    return build(recipe_of_both, CPU)


@pytest.fixture(scope="module")
def mixed(recipe_of_both: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run on both robots; nobody may change it."""
    out = tmp_path_factory.mktemp("mixed") / "run"
    evaluated = replace(recipe_of_both, eval=replace(recipe_of_both.eval, after=True, samples=2))
    assert run(evaluated, out).finished
    return out


@pytest.fixture(scope="module")
def checkpoint(mixed: Path) -> Path:
    return mixed / "checkpoints" / "step_000004"


def seen_by(actor_robot: Any, instruction: str = "go to the left") -> Observation:
    images = {c.name: np.full(c.shape, 99, np.uint8) for c in actor_robot.cameras}
    return Observation(images, np.full(actor_robot.state.shape, 0.5, np.float32), instruction)


def key(task: str = "t") -> EpisodeKey:
    return EpisodeKey(0, task, 0)


# -------------------------------------------------------------------------------------- statistics and shapes


def test_each_embodiment_has_the_statistics_of_its_own_training_episodes(experiment: Experiment) -> None:
    for store, ids in zip(experiment.data.stores, experiment.data.training, strict=True):
        states = np.concatenate([store.state(store.index(i)) for i in ids])
        statistics = experiment.codec_of(store).statistics["state"]
        assert statistics.to_json() == Statistics.of(states).to_json()


def test_cameras_of_other_names_share_a_slot_only_where_the_recipe_says_so(
    experiment: Experiment, card: Path, hand: Path
) -> None:
    assert experiment.codecs["dot"].config.cameras == ("front", "")
    assert experiment.codecs["hand"].config.cameras == ("head", "palm")
    apart = build(both(card, hand, adapt={"embodiments": {}}), CPU).codecs
    assert apart["dot"].config.cameras == ("front", "", "")
    assert apart["hand"].config.cameras == ("", "palm", "head")


def test_a_batch_of_both_is_padded_masked_and_says_whose_each_row_is(experiment: Experiment) -> None:
    steps = training_batches(experiment, first_step=0, rank=0, world=1)
    rows = [
        (k, b, i)
        for keys, b in (micro for _ in range(4) for micro in next(steps))
        for i, k in enumerate(keys)
    ]
    robots = set()
    for _, batch, i in rows:
        assert batch.embodiment_id is not None and batch.actions is not None and batch.action_mask is not None
        number = int(batch.embodiment_id[i])
        dimensions = (2, 4)[number]
        robots.add(number)
        assert not batch.action_mask[i, :, dimensions:].any() and batch.action_mask[i, 0, :dimensions].all()
        assert not batch.actions[i, :, dimensions:].any()
        assert batch.image_mask[i].tolist() == [True, number == 1]
    assert robots == {0, 1}


def test_only_the_dimensions_that_a_robot_has_count_in_the_loss(experiment: Experiment) -> None:
    """What the loss is divided by: 2 or 4 dimensions of each step within the episode, never 6."""
    [(_, batch)] = next(training_batches(experiment, first_step=0, rank=0, world=1))
    assert batch.action_mask is not None and batch.embodiment_id is not None
    real = batch.action_mask[:, :, 0].sum(dim=1)
    dimensions = torch.tensor([2, 4])[batch.embodiment_id]
    counts = experiment.policy.counts(batch, draws=1)
    assert sum(counts.values()) == int((real * dimensions).sum()) < batch.action_mask.numel()


# ------------------------------------------------------------------------------------------------------ order


def test_two_processes_take_the_rows_of_one(experiment: Experiment) -> None:
    def keys(rank: int, world: int, first: int = 0) -> list[list[tuple[int, int]]]:
        batches = training_batches(experiment, first_step=first, rank=rank, world=world)
        return [list(k) for _ in range(first, 4) for k, _ in next(batches)]

    whole, pair = keys(0, 1), [keys(rank, 2) for rank in (0, 1)]
    assert whole == [first + second for first, second in zip(*pair, strict=True)]
    assert keys(0, 1, first=2) == whole[2:], "a resumed run takes up the order"


def test_what_a_worker_loads_is_what_the_training_process_would(
    experiment: Experiment, recipe_of_both: Recipe
) -> None:
    """Workers get the indices of `rows_of` from the training process, whatever their number."""
    chunks = ChunkDataset(experiment.data.stores, experiment.codecs.chunk, experiment.data.training)
    order = order_of(chunks, experiment.data.weights, recipe_of_both.train.seed)
    wanted = [rows_of(order.batch(step, 4), 1, 0, 1)[0] for step in range(4)]
    steps = training_batches(experiment, first_step=0, rank=0, world=1)
    assert [list(next(steps)[0][0]) for _ in range(4)] == wanted


@pytest.mark.slow  # starts two processes that import torch
def test_workers_change_no_batch(experiment: Experiment) -> None:
    data = replace(experiment.recipe.data, workers=2)
    with_workers = replace(experiment, recipe=replace(experiment.recipe, data=data))
    for one, other in zip(
        training_batches(experiment, first_step=0, rank=0, world=1),
        training_batches(with_workers, first_step=0, rank=0, world=1),
        strict=True,
    ):
        for (keys, batch), (other_keys, other_batch) in zip(one, other, strict=True):
            assert list(keys) == list(other_keys)
            for name, value in batch.present().items():
                assert value.equal(other_batch.present()[name]), name


def test_a_dataset_in_two_halves_gives_the_statistics_and_batches_of_the_whole(tmp_path: Path) -> None:
    whole = write_dots(tmp_path / "whole")
    halves = []
    for task in ("left", "right"):
        folder = tmp_path / task
        (folder / "dots").mkdir(parents=True)
        shutil.copy(tmp_path / "whole" / "dots" / f"{task}_demo.hdf5", folder / "dots")
        (folder / "half.toml").write_text(whole.read_text().replace('name = "dots"', f'name = "{task}"', 1))
        halves.append(str(folder / "half.toml"))
    order = ("left", "right")
    one = build(tiny(whole, data={"validation": 0.0}), CPU)
    assert [i.task for i in one.data.stores[0].episodes] == [order[0]] * 4 + [order[1]] * 4
    two = build(tiny(whole, data={"validation": 0.0, "cards": tuple(halves)}), CPU)
    for name in ("state", "action"):
        assert one.codec.statistics[name].to_json() == two.codec.statistics[name].to_json()
    pair = [training_batches(e, first_step=0, rank=0, world=1) for e in (one, two)]
    for _ in range(8):
        (keys, batch), (other_keys, other_batch) = (next(steps)[0] for steps in pair)
        assert list(keys) == list(other_keys)  # and so the noise
        for name, value in batch.present().items():
            assert value.equal(other_batch.present()[name]), name


# --------------------------------------------------------------------------------------------- run and resume


def test_a_run_logs_the_held_out_loss_of_each_embodiment_beside_that_of_all(mixed: Path) -> None:
    for name in ("validation/loss", "validation/dot/loss", "validation/hand/loss"):
        assert [event["step"] for event in metrics(mixed) if name in event] == [0, 2, 4]


def test_the_agreement_says_what_holds_for_each_embodiment_and_the_share_of_each_dataset(mixed: Path) -> None:
    items = {item["name"]: item for item in json.loads((mixed / "agreement.json").read_text())["items"]}
    assert items["hand: camera slot 0 (front)"]["value"] == "head"
    assert items["dot: camera slot 1 (palm)"]["value"] == "empty"
    assert {"dot: normalised state", "hand: normalised state", "chunk", "prompt"} - set(items) == {"chunk"}
    assert items["weight of dots"]["value"].startswith("0.75 of the samples")


def test_a_resumed_run_ends_as_the_uninterrupted_one(
    recipe_of_both: Recipe, mixed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(mixed, out)
    assert run(recipe_of_both, out, resume=True, resume_from=2).finished
    assert_same(learned(out, 4), learned(mixed, 4))
    assert losses(out) == losses(mixed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {"dots": 1.0, "grasps": 1.0}}, r"data\.weights"),
        ({"embodiments": {"dots": "dot", "grasps": "other"}}, "other"),
    ],
)
def test_a_run_is_not_resumed_as_another_mixture(
    card: Path, hand: Path, mixed: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    shutil.copytree(mixed, tmp_path / "run")
    with pytest.raises(VlafitError, match=message):
        run(both(card, hand, data=change), tmp_path / "run", resume=True)


def test_held_out_episodes_of_each_dataset_are_evaluated_with_its_own_codec(mixed: Path) -> None:
    assert sorted(p.name for p in (mixed / "held_out").iterdir()) == ["dots", "grasps"]


# --------------------------------------------------------------------------------------------- acting by name


def test_an_actor_takes_the_embodiment_by_name(checkpoint: Path) -> None:
    codecs = CodecSet.load(checkpoint)
    assert codecs.names == ("dot", "hand")
    actor = load_actor(checkpoint, width=1)
    for name, dimensions in (("dot", 2), ("hand", 4)):
        observation = seen_by(codecs[name].embodiment)
        [chunk] = actor.act([observation], [key()], embodiment=name)
        assert chunk.actions.shape == (codecs.chunk, dimensions)
        named = load_actor(checkpoint, width=1, embodiment=name)
        assert named.embodiment.name == name
        assert (named.act([observation], [key()])[0].actions == chunk.actions).all()
        assert f"embodiment={name}" in named.fingerprint()
    with pytest.raises(ConfigError, match=r"2 embodiments \(dot, hand\)"):
        actor.act([observation], [key()])
    with pytest.raises(ConfigError, match=r"'hnd'; did you mean 'hand'"):
        load_actor(checkpoint, embodiment="hnd")


def test_eval_and_inspect_take_the_embodiment_by_name(
    checkpoint: Path, hand: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", str(checkpoint), "--data", str(hand), "--samples", "1", "--draws", "2"]
    out = ["--episodes", "close_demo/demo_0", "--out", str(tmp_path / "eval")]
    assert main([*command, *out]) != 0
    assert "--embodiment NAME" in capsys.readouterr().err
    assert main([*command, *out, "--embodiment", "dot"]) != 0
    assert "state shape" in capsys.readouterr().err
    assert main([*command, *out, "--embodiment", "hand"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(checkpoint)]) == 0
    shown = capsys.readouterr().out
    assert "robot    dot, 10 Hz" in shown and "robot    hand, 30 Hz" in shown


def test_a_format_of_one_embodiment_asks_which_and_vlafits_own_keeps_all(
    checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=r"2 embodiments \(dot, hand\).*--embodiment NAME"):
        export(checkpoint, "openpi", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    export(checkpoint, "tests.checkpoints.outside_format", tmp_path / "foreign", embodiment="hand")
    card = (tmp_path / "foreign" / "README.md").read_text()
    assert "| robot | hand, 30 Hz" in card and "dot, 10 Hz" not in card
    export(checkpoint, "vlafit", tmp_path / "all")
    assert CodecSet.load(tmp_path / "all").names == ("dot", "hand")
    export(checkpoint, "vlafit", tmp_path / "one", embodiment="hand")
    [codec] = CodecSet.load(tmp_path / "one")
    assert codec.embodiment.name == "hand" and codec.embodiment_id == 1


# ------------------------------------------------------------------------------------------ from a checkpoint


def after(checkpoint: Path, recipe: Recipe, **sections: Any) -> Recipe:
    policy = {
        "checkpoint": str(checkpoint),
        "family": "",
        "size": "",
        "config": {},
        **sections.pop("policy", {}),
    }
    for name, values in {"policy": policy, **sections}.items():
        recipe = replace(recipe, **{name: replace(getattr(recipe, name), **values)})
    return recipe


def test_an_embodiment_of_the_checkpoint_keeps_its_statistics_slots_and_number(
    checkpoint: Path, hand: Path, recipe_of_both: Recipe
) -> None:
    before = CodecSet.load(checkpoint)
    data = {"cards": (str(hand),), "embodiments": {"grasps": "hand"}, "weights": {}}
    recipe = after(checkpoint, recipe_of_both, data=data, adapt={"embodiments": {}, "cameras": {}})
    codec = build(recipe, CPU).codec
    assert codec.config == before["hand"].config and codec.embodiment_id == 1
    assert codec.statistics["state"].to_json() == before["hand"].statistics["state"].to_json()


def test_the_recipe_of_the_page_works_as_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "mixtures.md").read_text(encoding="utf-8")
    for block in re.findall(r"^```toml\n# (\S+\.toml)\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE):
        (tmp_path / block[0]).write_text(block[1])
    (tmp_path / "data").symlink_to(Path(__file__).parents[2] / "data")
    monkeypatch.chdir(tmp_path)
    recipe = config.read(Recipe, tmp_path / "two-robots.toml", "recipe")
    preflight.check(recipe, 1)
    pasted = build(replace(recipe, train=replace(recipe.train, batch_size=4)), CPU)
    assert pasted.codecs.names == ("sawyer", "gantry")
    assert [codec.config.cameras for codec in pasted.codecs] == [("workspace",), ("table",)]
    [(_, batch)] = next(training_batches(pasted, first_step=0, rank=0, world=1))
    assert batch.embodiment_id is not None and sorted(batch.embodiment_id.tolist()) == [0, 0, 0, 1]


def test_a_robot_that_the_checkpoint_does_not_name_needs_to_know_whose_statistics_count(
    checkpoint: Path, card: Path, recipe_of_both: Recipe
) -> None:
    data = {"cards": (str(card),), "embodiments": {"dots": "new"}, "weights": {}}
    recipe = after(checkpoint, recipe_of_both, data=data, adapt={"embodiments": {}})
    with pytest.raises(ConfigError, match=r"2 embodiments \(dot, hand\).*policy\.embodiment"):
        build(recipe, CPU)
    codec = build(after(checkpoint, recipe, policy={"embodiment": "dot"}), CPU).codec
    assert codec.embodiment.name == "new" and codec.embodiment_id == 2


def test_a_checkpoint_of_ours_names_the_slots_of_two_new_robots_without_a_camera_of_that_name(
    checkpoint: Path, hand: Path, recipe_of_both: Recipe
) -> None:
    other = hand.with_name("other.toml")
    other.write_text(HAND.replace('name = "grasps"', 'name = "other"', 1))
    robot = {"robot": True, "resize": True}
    robots = {
        "left": AdaptRecipe(**robot, cameras={"front": "palm"}),
        "right": AdaptRecipe(**robot, cameras={"front": "head"}),
    }
    data = {
        "cards": (str(hand), str(other)),
        "embodiments": {"grasps": "left", "other": "right"},
        "weights": {},
        "validation": 0.0,
        "statistics": "data",
    }
    adapt = {"embodiments": robots, "cameras": {}}
    recipe = after(checkpoint, recipe_of_both, data=data, policy={"embodiment": "dot"}, adapt=adapt)
    slots = [codec.config.cameras for codec in build(recipe, CPU).codecs]
    assert [slot for slot, *_ in slots] == ["palm", "head"]


def test_a_foreign_checkpoint_names_the_slots_of_two_robots_and_each_has_its_row(
    card: Path, hand: Path, recipe_of_both: Recipe
) -> None:
    policy = {
        "tokenizer": str(GROOT / "char_tokenizer"),
        "config": {"embodiment_rows": [11, 12]},
        "fresh": ("embodiment:11", "embodiment:12"),
    }
    robot = {"robot": True, "resize": True}
    robots = {
        "dot": AdaptRecipe(**robot, cameras={"front": "front", "wrist": ""}),
        "hand": AdaptRecipe(**robot, cameras={"front": "head", "wrist": "palm"}),
    }
    recipe = after(GROOT, recipe_of_both, policy=policy, adapt={"embodiments": robots, "cameras": {}})
    built = build(replace(recipe, data=replace(recipe.data, statistics="data")), CPU)
    assert [codec.config.cameras for codec in built.codecs] == [("front", ""), ("head", "palm")]
    assert [codec.embodiment_id for codec in built.codecs] == [0, 1]
    assert "embodiment 'hand': the weights of embodiment_rows 12" in built.load_report
    alone = {"cards": (str(hand),), "embodiments": {}, "weights": {}}
    adapted = {"embodiments": {}, "cameras": robots["hand"].cameras, **robot}
    recipe = after(GROOT, recipe, data={"statistics": "data", **alone}, policy=policy, adapt=adapted)
    with pytest.raises(ConfigError, match=r"policy.fresh: 'embodiment:12' .* of embodiment_rows 11\."):
        build(recipe, CPU)


# ---------------------------------------------------------------------------------------------------- refused


def test_two_robots_without_names_are_refused_with_the_table_to_add(card: Path, hand: Path) -> None:
    recipe = both(card, hand, data={"embodiments": {}})
    with pytest.raises(EmbodimentError, match=r'data\.embodiments = \{ "dots" = "dot", "grasps" = "five'):
        open_data(recipe.data, 0)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"embodiments": {"dots": "dot"}}}, r"data\.embodiments does not name card 'grasps'"),
        ({"data": {"weights": {"dots": 1.0}}}, r"data\.weights does not name card 'grasps'"),
        ({"data": {"weights": {"dots": 1.0, "grasps": 1.0, "grasp": 1.0}}}, "'grasp'; did you mean 'grasps'"),
        ({"data": {"weights": {"dots": 1.0, "grasps": -1.0}}}, r"data\.weights: .*above 0"),
        ({"data": {"embodiments": {"dots": "a/b", "grasps": "hand"}}}, "without '/'"),
        (
            {"data": {"embodiments": {"dots": "one", "grasps": "one"}}, "adapt": {"embodiments": {}}},
            "action shape",
        ),
        ({"adapt": {"embodiments": {"hnd": AdaptRecipe()}}}, r"adapt\.embodiments\.hnd has no effect"),
        (
            {"adapt": {"embodiments": {"hand": AdaptRecipe(cameras={"frnt": "head"})}}},
            "'frnt'; did you mean 'front'",
        ),
        (
            {"adapt": {"embodiments": {"hand": AdaptRecipe(cameras={"front": "hed"})}}},
            "'hed'; did you mean 'head'",
        ),
    ],
)
def test_a_mixture_that_cannot_be_is_refused_by_key(
    card: Path, hand: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(VlafitError, match=message):
        build(both(card, hand, **sections), CPU)


def test_rollouts_and_validation_sets_of_a_mixture_name_their_embodiment(
    card: Path, hand: Path, tmp_path: Path
) -> None:
    protocol = str(card.parent / "toy.toml")
    with pytest.raises(ConfigError, match=r"eval\.embodiment"):
        run(both(card, hand, eval={"protocol": protocol, "after": True}), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"'hnd'.*did you mean 'hand'"):
        run(both(card, hand, eval={"embodiment": "hnd"}), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"policy\.embodiment 'dot'.*policy\.checkpoint is empty"):
        run(both(card, hand, policy={"embodiment": "dot"}), tmp_path / "run")
    other = write_dots(tmp_path / "other", seed=5)
    other.write_text(other.read_text().replace('name = "dots"', 'name = "later"', 1))
    sets = {"validation_sets": {"later": str(other)}}
    with pytest.raises(ConfigError, match=r"data\.embodiments does not name .*'later'"):
        build(both(card, hand, data=sets), CPU)
    named = build(both(card, hand, data={**sets, "embodiments": {**NAMES, "later": "dot"}}), CPU)
    assert named.codec_of(named.validation_sets["later"][0]) is named.codecs["dot"]
