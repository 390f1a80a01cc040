"""Before training: data and checkpoint agree, no tokenizer is made up, and no value is extreme.

The first table is a check made by hand: for each pair of card and checkpoint, the error that must come, or
the numbers that the policy must be given for the first sample (state (0.5, 0), action (1.5, 2)).
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import vlafit
from tests.checkpoints.test_export import GIVEN
from tests.train.agreement_world import (
    EPISODES,
    STEPS,
    recipe_of,
    start,
    states,
    write_card,
    write_checkpoint,
)
from vlafit import agreement, checkpoints, cli
from vlafit.checkpoints.export import export
from vlafit.checkpoints.formats.lerobot import write as lerobot_write
from vlafit.codec import Normaliser, Statistics, train_word_tokenizer
from vlafit.codec.normaliser import FLOORED
from vlafit.errors import CodecError, ConfigError, DataError, EmbodimentError, VlafitError
from vlafit.recipe import PolicyRecipe
from vlafit.train import run
from vlafit.train.initial_policy import InitialPolicy
from vlafit.types import Observation, Sample

FIXTURES = Path(__file__).parents[1] / "fixtures"
SMOLVLA, OPENPI = FIXTURES / "lerobot_smolvla", FIXTURES / "openpi_pi0"
OPENPI_SAYS = {"vision.heads": 2, "chunk": 6}


def numbers(initial: InitialPolicy, camera: str, size: int = 16, scale: float = 1.0):
    """Return normalised state and first action of the first sample, and the image mask."""
    chunk = initial.codec.config.chunk
    images = {camera: np.full((size, size, 3), 7, np.uint8)}
    seen = Observation(images, states()[0] * np.float32(scale), "reach out")
    actions = ((states() + np.float32([1, 2])) * np.float32(scale))[:chunk]
    encoded = initial.codec.encode(Sample(seen, actions, np.ones(chunk, bool), ("joints", "demo_0", 0)))
    assert encoded.actions is not None
    return encoded.state[:2].tolist(), encoded.actions[0, :2].tolist(), encoded.image_mask.tolist()


# By hand. With the checkpoint's statistics: state (x - 0) / 1; action absolute (1.5 - 0.5) / 2 = 0.5 and
# (2 - 0.5) / 2 = 0.75; relative in the first dimension (1.5 - 0.5 - 0.5) / 2 = 0.25.
# Fitted to the data: state 0.5 + 0.1 t for t = 0..5 has mean 0.75 and std 0.1 sqrt(35 / 12) = 0.170783, so
# that the first is -0.25 / 0.170783 = -1.46385; -0.1 t has mean -0.25, and 0 gives 1.46385. Actions likewise:
# absolute (-1.46385, 1.46385). Relative in both: chunk rows of 4 steps differ from the start by 0.1 k, with
# 6, 5, 4, 3 rows for k = 0..3: mean of k = 22 / 18, of k^2 = 48 / 18, std of k = sqrt(48/18 - (22/18)^2)
# = 1.083048, so that k = 0 gives -(22 / 18) / 1.083048 = -1.12850 and, as the other falls, 1.12850.
CHECKPOINT = ([0.5, 0.0], [0.5, 0.75])
FITTED = ([-1.46385, 1.46385], [-1.46385, 1.46385])
FITTED_RELATIVE = ([-1.46385, 1.46385], [-1.12850, 1.12850])
FIRST, BOTH = "[true, false]", "[true, true]"

RIGHT: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str, Any, list[bool]]] = {
    # name: card, checkpoint, adapt, statistics, (state, action), image mask
    "the same": ({}, {}, {}, "checkpoint", CHECKPOINT, [True]),
    "fitted": ({}, {}, {}, "data", FITTED, [True]),
    "both relative in one": (
        {"relative": FIRST}, {"relative": (True, False)}, {}, "checkpoint",
        ([0.5, 0.0], [0.25, 0.75]), [True],
    ),
    "the checkpoint's relative actions": (
        {}, {"relative": (True, False)}, {"actions": "checkpoint"}, "checkpoint",
        ([0.5, 0.0], [0.25, 0.75]), [True],
    ),
    "the checkpoint's absolute actions": (
        {"relative": BOTH}, {}, {"actions": "checkpoint"}, "checkpoint", CHECKPOINT, [True],
    ),
    "the card's relative actions, fitted": (
        {"relative": BOTH}, {}, {"actions": "data"}, "data", FITTED_RELATIVE, [True],
    ),
    "the card's absolute actions, fitted": (
        {}, {"relative": (True, True)}, {"actions": "data"}, "data", FITTED, [True],
    ),
    "the checkpoint's relative actions, fitted": (
        {}, {"relative": (True, True)}, {"actions": "checkpoint"}, "data", FITTED_RELATIVE, [True],
    ),
    "a camera by map": (
        {"cameras": ("top",)}, {}, {"cameras": {"front": "top"}}, "checkpoint", CHECKPOINT, [True],
    ),
    "a second slot left empty": (
        {}, {"cameras": ("wrist", "front")}, {"cameras": {"wrist": ""}}, "checkpoint",
        CHECKPOINT, [False, True],
    ),
    "larger frames": ({"size": 32}, {}, {"resize": True}, "checkpoint", CHECKPOINT, [True]),
    "another rate": ({"hz": 20.0}, {}, {"robot": True}, "checkpoint", CHECKPOINT, [True]),
    "another unit, fitted": ({"unit": "deg"}, {}, {"robot": True}, "data", FITTED, [True]),
    "a robot with fewer joints, fitted": ({}, {"dimensions": 3}, {"robot": True}, "data", FITTED, [True]),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_a_pair_that_fits_or_is_adapted_gives_the_numbers_computed_by_hand(name: str, tmp_path: Path):
    card, base, adapt, statistics, (state, action), mask = RIGHT[name]
    recipe = recipe_of(
        write_card(tmp_path / "data", **card),
        write_checkpoint(tmp_path / "base", **base),
        adapt,
        statistics=statistics,
    )
    initial = start(recipe)
    camera = card.get("cameras", ("front",))[0]
    got_state, got_action, got_mask = numbers(initial, camera, card.get("size", 16))
    assert got_state == pytest.approx(state, abs=2e-4)
    assert got_action == pytest.approx(action, abs=2e-4)
    assert got_mask == mask
    assert initial.agreement is not None
    shown = {item.reason.split(" ")[0].split(",")[0] for item in initial.agreement.chosen}
    assert all(any(f"adapt.{key}" in one.reason for one in initial.agreement.chosen) for key in adapt), shown


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str, tuple[str, ...]]] = {
    # name: card, checkpoint, adapt, statistics, what the error must name
    "card relative": ({"relative": BOTH}, {}, {}, "checkpoint", ("all relative", "absolute", "actions = ")),
    "checkpoint relative": ({}, {"relative": (True, False)}, {}, "checkpoint", ("dimensions 0", "absolute")),
    "card relative, fitted": ({"relative": BOTH}, {}, {}, "data", ("all relative", "[adapt] actions")),
    "card's actions on old statistics": (
        {"relative": BOTH}, {}, {"actions": "data"}, "checkpoint", ('data.statistics = "data"',),
    ),
    "another camera": ({"cameras": ("top",)}, {}, {}, "checkpoint", ("top", 'front = "CAMERA"')),
    "another camera, fitted": ({"cameras": ("top",)}, {}, {}, "data", ("top", 'front = "CAMERA"')),
    "one of two cameras": ({}, {"cameras": ("front", "wrist")}, {}, "checkpoint", ("wrist", 'wrist = ""')),
    "one of two cameras, fitted": ({}, {"cameras": ("front", "wrist")}, {}, "data", ("wrist", 'wrist = ""')),
    "another size": ({"size": 32}, {}, {}, "checkpoint", ("32x32", "16x16", "[adapt] resize = true")),
    "wrong hand": (
        {"cameras": ("left_wrist",)}, {"cameras": ("right_wrist",)},
        {"cameras": {"right_wrist": "left_wrist"}}, "data", ("left_wrist", "right_wrist", "correct"),
    ),
    "more dimensions": ({}, {"dimensions": 3}, {}, "data", ("2", "3", "[adapt] robot = true")),
    "more dimensions, old statistics": (
        {}, {"dimensions": 3}, {"robot": True}, "checkpoint",
        ('[adapt] robot = true is set', 'set data.statistics = "data", too'),
    ),
    "another unit": ({"unit": "deg"}, {}, {}, "checkpoint", ("deg", "rad")),
    "another order": ({"labels": '["b", "a"]'}, {}, {}, "checkpoint", ("b, a", "a, b", "in another order")),
    "another control": ({"control": "joint_velocity"}, {}, {}, "data", ("joint_velocity", "joint_position")),
    "another rate of relative actions": (
        {"relative": BOTH, "hz": 20.0}, {"relative": (True, True)}, {"robot": True}, "checkpoint",
        ("20 Hz", "10 Hz", "relative", "--adapt.robot true --data.statistics data"),
    ),
    "degrees that the card calls radians": ({"scale": 57.29578}, {}, {}, "checkpoint",
                                            ("action.b", "units", "adapt")),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_pair_that_does_not_fit_is_an_error_that_names_both_sides_and_the_remedy(name: str, tmp_path: Path):
    card, base, adapt, statistics, words = WRONG[name]
    recipe = recipe_of(
        write_card(tmp_path / "data", **card),
        write_checkpoint(tmp_path / "base", **base),
        adapt,
        statistics=statistics,
    )
    with pytest.raises(EmbodimentError) as error:
        start(recipe)
    assert [word for word in words if word not in str(error.value)] == []


def test_statistics_of_relative_actions_are_not_used_for_chunks_of_other_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    base = write_checkpoint(tmp_path / "base", relative=(True, True))
    card = write_card(tmp_path / "data", relative=BOTH)
    recipe = recipe_of(card, base, {}, statistics="checkpoint")
    longer = replace(recipe, policy=replace(recipe.policy, config={"chunk": 6}))
    with pytest.raises(EmbodimentError) as error:
        start(longer)
    for word in ("chunk: ", "policy.config.chunk = 6", "4 steps", "--data.statistics data"):
        assert word in str(error.value)
    initial = start(replace(longer, data=replace(longer.data, statistics="data")))
    # All starts of 6 steps: 6, 5, ... 1 rows for k = 0, ... 5 in each of 3 episodes, differences 1 + 0.1 k.
    assert initial.codec.statistics["action"].count == 3 * 21
    assert initial.codec.statistics["action"].mean[0] == pytest.approx(1 + 0.1 * 35 / 21, abs=1e-6)
    assert row_of(initial, "chunk") == ("4 steps", "6 steps", "chosen", "policy.config.chunk")
    arguments = ["inspect", str(base), "--data", str(card)]
    assert cli.main([*arguments, "--config", "chunk=6"]) == 1
    assert "conflict: chunk: " in capsys.readouterr().err


def test_a_changed_chunk_of_absolute_actions_keeps_the_statistics_and_is_shown(tmp_path: Path):
    base = write_checkpoint(tmp_path / "base")
    recipe = recipe_of(write_card(tmp_path / "data"), base, {}, statistics="checkpoint")
    assert row_of(start(recipe), "chunk") == ("4 steps", "4 steps", "same", "")
    initial = start(replace(recipe, policy=replace(recipe.policy, config={"chunk": 6})))
    assert row_of(initial, "chunk") == ("4 steps", "6 steps", "chosen", "policy.config.chunk")


def row_of(initial: InitialPolicy, name: str) -> tuple[str | None, str, str, str]:
    """Return checkpoint, value, status and reason of an item of the agreement."""
    assert initial.agreement is not None
    (item,) = (one for one in initial.agreement.items if one.name == name)
    return item.sides.get("checkpoint"), item.value, item.status, item.reason


def test_what_a_second_card_leaves_unsaid_is_a_line_and_what_it_exchanges_an_error_unless_confirmed(
    tmp_path: Path,
):
    cards = [
        write_card(tmp_path / "one", cameras=("front", "top")),
        write_card(tmp_path / "two", cameras=("front", "top"), labels="[]", unit=""),
    ]
    text = cards[1].read_text().replace('name = "joints"', 'name = "bare"')
    front, top = text.rindex('key = "obs/front"'), text.index('key = "obs/front"')
    assert front != top
    cards[1].write_text(text[:top] + 'key = "obs/top"' + text[top + len('key = "obs/front"') :])
    with h5py.File(cards[1].parent / "joints" / "reach_demo.hdf5", "r+") as file:
        for number in range(EPISODES):
            front = file[f"data/demo_{number}/obs/front"]
            front[...] = front[()] + 100  # else they would be the episodes of the first card
            file[f"data/demo_{number}/obs/top"] = front[()] + 9

    def started(adapt: dict[str, Any]) -> InitialPolicy:
        recipe = recipe_of(cards[0], None, adapt)
        return start(replace(recipe, data=replace(recipe.data, cards=tuple(map(str, cards)))))

    with pytest.raises(
        EmbodimentError, match="camera front reads obs/top(.|\\n)*--adapt.cameras.front front"
    ):
        started({})
    with pytest.raises(ConfigError, match=r"adapt\.cameras\.front maps a checkpoint's cameras"):
        started({"cameras": {"front": "top"}})
    initial = started({"cameras": {"front": "front"}})
    assert initial.agreement is not None
    lines = {item.name: item for item in initial.agreement.items if item.name.endswith("of bare")}
    columns = [f"{column} {what} of bare" for column in ("state", "action") for what in ("names", "unit")]
    assert set(lines) == {*columns}
    assert all(
        lines[name].status == "assumed" and "bare: not stated" in lines[name].sides["dataset"]
        for name in columns
    )


def test_a_checkpoint_of_another_prompt_keeps_it(tmp_path: Path):
    base = write_checkpoint(tmp_path / "base", prompt="line")
    for statistics in ("checkpoint", "data"):
        card = write_card(tmp_path / statistics)
        initial = start(recipe_of(card, base, {}, statistics=statistics))
        assert initial.codec.config.prompt == "line"


# -------------------------------------------------------------------------------------------- tokenizer


@pytest.mark.case(
    section="data",
    report="the policy ignores the instruction",
    user_has="pretrained language weights, no tokenizer",
    now="refused; `policy.tokenizer`",
)
def test_pretrained_language_weights_without_a_tokenizer_are_refused_by_name(tmp_path: Path):
    base = write_checkpoint(tmp_path / "base", codec=False)
    recipe = recipe_of(write_card(tmp_path / "data"), base, {}, statistics="data")
    with pytest.raises(ConfigError) as error:
        start(recipe)
    for word in (
        str(base),
        "policy.tokenizer",
        "google/paligemma-3b-pt-224",
        "gated",
        'fresh = ["language"]',
    ):
        assert word in str(error.value)
    fresh = start(replace(recipe, policy=replace(recipe.policy, fresh=("language",))))
    assert "tokenizer: learned from the data's instructions" in fresh.report


@pytest.mark.case(
    section="data",
    report="`CUDA error: device-side assert` in the embedding",
    user_has="a tokenizer with more tokens than the embedding has rows",
    now="an error with both numbers",
)
def test_a_given_tokenizer_must_fit_the_embedding(tmp_path: Path):
    base = write_checkpoint(tmp_path / "base", codec=False)
    recipe = recipe_of(write_card(tmp_path / "data"), base, {}, statistics="data")
    sentences = [f"number {n} and {n * n}" for n in range(400)]
    for size, fits in ((280, True), (900, False)):
        folder = tmp_path / str(size)
        train_word_tokenizer(sentences, size).save(folder)
        given = replace(recipe, policy=replace(recipe.policy, tokenizer=str(folder / "tokenizer.json")))
        if fits:
            initial = start(given)
            assert initial.codec.required_tokenizer.vocab_size == 280
            assert initial.agreement is not None
            held = {item.name: item.value for item in initial.agreement.items}
            assert "policy.tokenizer" in held["tokenizer"]
        else:
            with pytest.raises(CodecError, match="900 tokens.*only 300 rows"):
                start(given)


def test_a_tokenizer_of_a_much_smaller_model_is_not_taken_for_that_of_the_weights(tmp_path: Path):
    train_word_tokenizer(["reach out"], 265).save(tmp_path / "words")
    card = write_card(tmp_path / "data", cameras=("cam_high",))
    policy = PolicyRecipe(checkpoint=str(OPENPI), config=dict(OPENPI_SAYS), tokenizer=str(tmp_path / "words"))
    maps = {"base_0_rgb": "cam_high", "left_wrist_0_rgb": "", "right_wrist_0_rgb": ""}
    recipe = replace(recipe_of(card, None, {"cameras": maps}, statistics="data"), policy=policy)
    rows = checkpoints.inspect(OPENPI, config=OPENPI_SAYS).policy.needs().vocabulary
    with pytest.raises(CodecError, match=f"tokens, the .*embedding .*{rows} rows"):
        start(recipe)


def test_openpis_checkpoint_is_refused_without_the_tokenizer_of_its_family(tmp_path: Path):
    card = write_card(tmp_path / "data")
    policy = PolicyRecipe(checkpoint=str(OPENPI), config=dict(OPENPI_SAYS))
    for statistics in ("checkpoint", "data"):
        recipe = replace(recipe_of(card, None, {}, statistics=statistics), policy=policy)
        with pytest.raises(ConfigError, match="google/paligemma-3b-pt-224"):
            start(recipe)


def lerobot(folder: Path, *, tokenizer: str = "", processors: bool = True, **config: Any) -> Path:
    """Copy LeRobot's tiny SmolVLA; its processors may name a tokenizer of the Hub, or lack altogether."""
    shutil.copytree(SMOLVLA, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if not processors:
        for file in folder.glob("policy_p*"):
            file.unlink()
    elif tokenizer:
        shutil.rmtree(folder / "tokenizer")
        path = folder / "policy_preprocessor.json"
        values = json.loads(path.read_text())
        for step in values["steps"]:
            if step["registry_name"] == "tokenizer_processor":
                step["config"]["tokenizer_name"] = tokenizer
                step.pop("artifacts")
        path.write_text(json.dumps(values))
    return folder


def test_lerobots_checkpoint_that_names_a_tokenizer_of_the_hub_is_refused_without_it(tmp_path: Path):
    name = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
    base = lerobot(tmp_path / "base", tokenizer=name)
    with pytest.raises(ConfigError, match=f"it holds no tokenizer .*{name}.*policy.tokenizer"):
        start(recipe_of(write_card(tmp_path / "data"), base, {}, statistics="data"))


@pytest.mark.parametrize(
    "reason", [r"no statistics of observation\.state", r"action\.std is 0 in dimension 0"]
)
def test_a_checkpoint_that_holds_its_tokenizer_and_no_statistics_trains_with_it(tmp_path: Path, reason: str):
    base = lerobot(tmp_path / "base")
    for file in base.glob("policy_*.safetensors"):
        tensors = load_file(file)
        if "action" in reason:
            tensors["action.std"][0] = 0.0
        else:
            tensors = {name: t for name, t in tensors.items() if not name.startswith("observation.state")}
        save_file(tensors, file)
    card = write_card(tmp_path / "data")
    adapt = {"cameras": MAPS, "resize": True, "robot": True}
    initial = start(recipe_of(card, base, adapt, statistics="data"))
    assert initial.codec.required_tokenizer.vocab_size == 106
    assert initial.agreement is not None
    (item,) = [one for one in initial.agreement.items if one.name == "tokenizer"]
    assert item.value.startswith("the checkpoint's")
    with pytest.raises(ConfigError, match=f"gives none: .*{reason}"):
        start(recipe_of(card, base, adapt))


@pytest.mark.parametrize(
    ("chosen", "held", "reason"),
    [("", "quantile", "divided by a floor"), ("min_max", "min_max", "data.normalisation")],
)
def test_the_normalisation_of_processors_without_statistics_holds_or_is_said(
    tmp_path: Path, chosen: str, held: str, reason: str
):
    """That of the family was taken without a line."""
    base = lerobot(tmp_path / "base")
    for file in base.glob("policy_*.safetensors"):
        save_file({n: t for n, t in load_file(file).items() if not n.startswith("observation.state")}, file)
    for path in (base / "policy_preprocessor.json", base / "policy_postprocessor.json"):
        path.write_text(path.read_text().replace("MEAN_STD", "QUANTILES"))
    adapt = {"cameras": MAPS, "resize": True, "robot": True}
    card = write_card(tmp_path / "data")
    recipe = recipe_of(card, base, adapt, statistics="data", normalisation=chosen)
    initial = start(recipe)
    assert (initial.codec.config.normalisation, initial.codec.config.of_actions) == (held, held)
    assert initial.agreement is not None
    said = [one for one in initial.agreement.items if one.name.endswith("normalisation")]
    assert said and all(
        one.sides["checkpoint"] == "lerobot_quantile" and reason in one.reason for one in said
    )


def test_statistics_of_one_column_among_the_weights_train_with_fitted_ones_and_a_tokenizer(tmp_path: Path):
    base = lerobot(tmp_path / "base", processors=False)
    tensors = load_file(base / "model.safetensors")
    for module in ("normalize_targets", "unnormalize_outputs"):
        tensors |= {f"{module}.buffer_action.{name}": torch.ones(6) for name in ("mean", "std")}
    save_file(tensors, base / "model.safetensors")
    recipe = recipe_of(
        write_card(tmp_path / "data"),
        base,
        {"cameras": MAPS, "resize": True, "robot": True},
        statistics="data",
    )
    words = str(SMOLVLA / "tokenizer")
    policy = replace(recipe.policy, tokenizer=words, fresh=("language",))
    assert start(replace(recipe, policy=policy)).codec.required_tokenizer.vocab_size == 106


def test_a_tokenizer_folder_that_was_lost_is_named_and_no_other_tokenizer(tmp_path: Path):
    base = lerobot(tmp_path / "base")
    shutil.rmtree(base / "tokenizer")
    with pytest.raises(ConfigError) as error:
        start(recipe_of(write_card(tmp_path / "data"), base, {}, statistics="data"))
    assert str(base / "tokenizer") in str(error.value) and "SmolVLM2" not in str(error.value)


@pytest.mark.case(
    section="data",
    report="statistics are not those that were asked for",
    user_has='`data.statistics = "checkpoint"`, a checkpoint without',
    now="an error; never fitted in silence",
)
def test_missing_statistics_are_never_fitted_in_silence(tmp_path: Path):
    base = write_checkpoint(tmp_path / "base", codec=False)
    recipe = recipe_of(write_card(tmp_path / "data"), base, {})
    recipe = replace(recipe, policy=replace(recipe.policy, fresh=("language",)))
    with pytest.raises(ConfigError, match='the checkpoint gives none.*data.statistics = "data"'):
        start(recipe)


# --------------------------------------------------------------------------------------------- LeRobot

MAPS = {"cam_high": "front", "cam_wrist": ""}


@pytest.mark.case(
    section="data",
    report="Aloha policies act mirrored",
    user_has="`adapt_to_pi_aloha` or `use_delta_joint_actions_aloha` in config.json",
    now="an error that names the flag",
)
@pytest.mark.parametrize(
    "flag", ["adapt_to_pi_aloha", "use_delta_joint_actions_aloha", "use_relative_actions"]
)
def test_flags_of_a_lerobot_config_without_processors_are_errors(flag: str, tmp_path: Path):
    base = lerobot(tmp_path / "base", processors=False, **{flag: True})
    recipe = recipe_of(
        write_card(tmp_path / "data"), base, {"cameras": MAPS, "resize": True}, statistics="data"
    )
    recipe = replace(recipe, policy=replace(recipe.policy, fresh=("language",)))
    words = flag if flag != "use_relative_actions" else "relative actions: dataset: absolute; checkpoint: all"
    with pytest.raises(VlafitError, match=words):
        start(recipe)


def test_the_row_of_relative_actions_names_the_flag_that_makes_alohas_joints_relative(tmp_path: Path):
    flag = "use_delta_joint_actions_aloha"
    base = lerobot(tmp_path / "base", processors=False, **{flag: True})
    recipe = recipe_of(
        write_card(tmp_path / "data"), base, {"cameras": MAPS, "resize": True}, statistics="data"
    )
    recipe = replace(recipe, policy=replace(recipe.policy, fresh=("language",)))
    made = f"{flag}: joints relative, grippers absolute"
    with pytest.raises(EmbodimentError, match=f"relative actions: dataset: absolute; checkpoint: {made}"):
        start(recipe)
    accepted = replace(recipe, adapt=replace(recipe.adapt, robot=True))
    agreement = start(accepted).agreement
    assert agreement is not None
    (row,) = [item for item in agreement.items if item.name == "relative actions"]
    assert (row.value, row.status, row.reason) == ("absolute", "chosen", "adapt.robot")
    assert row.sides["checkpoint"].startswith(made)
    other = replace(accepted, adapt=replace(accepted.adapt, actions="checkpoint"))
    with pytest.raises(EmbodimentError, match='not with .adapt. actions = "checkpoint"'):
        start(other)


def test_lerobots_cameras_are_matched_by_name_whatever_their_order():
    declared = checkpoints.declaration(SMOLVLA)
    assert declared.slots == ("cam_high", "cam_wrist") and declared.says_frame_sizes
    assert checkpoints.declaration(OPENPI).slots[0] == "base_0_rgb"


@pytest.mark.case(
    section="data",
    report="wrong places, from a policy of LeRobot",
    user_has="processors or `use_relative_actions` that make actions relative, a card that does not",
    now="an error with both masks",
)
def test_lerobots_processors_that_make_actions_relative_are_compared_with_the_card(tmp_path: Path):
    base = lerobot(tmp_path / "base")
    for name, place, step in (
        ("policy_preprocessor.json", 5, {"registry_name": "relative_actions_processor"}),
        ("policy_postprocessor.json", 1, {"registry_name": "absolute_actions_processor"}),
    ):
        path = base / name
        values = json.loads(path.read_text())
        values["steps"].insert(place, step | {"config": {"enabled": True}})
        path.write_text(json.dumps(values))
    recipe = recipe_of(write_card(tmp_path / "data"), base, {})
    with pytest.raises(EmbodimentError, match="relative actions: dataset: absolute; checkpoint: all"):
        start(recipe)


@pytest.mark.case(
    section="checkpoints",
    report="normalised by statistics that nobody chose",
    user_has="adapters of LeRobot without processors beside them",
    now="the base's statistics hold, and load report and agreement name the base",
)
def test_statistics_of_the_base_of_adapters_are_said_to_be_the_bases(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(lerobot_write, "refusals", lambda policy, codec: [])  # no tiny size has a name there
    policy, codec, *_ = vlafit.load_checkpoint(write_checkpoint(tmp_path / "own"))
    rule = {"select": {"part": "expert", "kind": "mlp"}, "mode": "lora", "rank": 2}
    plan = vlafit.apply_strategy(policy, [rule, {"mode": "frozen"}])
    vlafit.save_checkpoint(policy, tmp_path / "adapted", codec, plan=plan)
    folder = tmp_path / "out"
    export(tmp_path / "adapted", "lerobot", folder)
    card = write_card(tmp_path / "data")
    recipe = recipe_of(card, folder, {}, statistics="checkpoint")
    recipe = replace(recipe, policy=replace(recipe.policy, config=GIVEN))

    def statistics() -> tuple[str, str, str]:
        initial = start(recipe)
        assert initial.agreement is not None
        of = {item.name: item.value for item in initial.agreement.items}
        return of["statistics"], of["tokenizer"], initial.report

    whose, tokenizer, report = statistics()
    assert whose == "of the checkpoint" and "base" not in tokenizer and "statistics are" not in report
    for file in folder.glob("policy_p*"):
        file.unlink()
    whose, tokenizer, report = statistics()
    assert whose == f"of the base {folder / 'base'}" and f"of the base {folder / 'base'}" in tokenizer
    assert f"statistics are of the base {folder / 'base'}" in report
    assert checkpoints.inspect(folder, config=GIVEN).report.statistics_of == str(folder / "base")
    for file in (folder / "base").glob("policy_p*"):
        file.unlink()
    report = checkpoints.inspect(folder, config=GIVEN).report  # without statistics, the base still describes
    assert report.codec and "statistics are" not in report.text()
    assert report.owner == f"the base {folder / 'base'}"


# ------------------------------------------------------------------------------------- values and floors


@pytest.mark.case(
    section="data",
    report="loss of 1e5 and exit 0",
    user_has="degrees instead of radians, statistics of another robot",
    now="an error per dimension; units, statistics or `adapt.outside`",
)
def test_a_dimension_may_be_extreme_only_where_the_recipe_lists_it(tmp_path: Path):
    base = write_checkpoint(tmp_path / "base")
    card = write_card(tmp_path / "data", scale=57.29578)
    every = ("state.a", "state.b", "action.0", "action.b")
    initial = start(recipe_of(card, base, {"outside": every}))
    assert initial.agreement is not None
    assert {item.name for item in initial.agreement.chosen} >= {"normalised state.a", "normalised action.b"}
    unnamed = write_card(tmp_path / "unnamed", scale=57.29578, labels="[]")
    assert start(recipe_of(unnamed, base, {"outside": every})), "the checkpoint's names are accepted, too"
    with pytest.raises(ConfigError, match="no dimension 'action.c'"):
        start(recipe_of(card, base, {"outside": ("action.c",)}))


@pytest.mark.case(
    section="data",
    report="columns in another order than the checkpoint's, without names",
    user_has="unlabelled columns, normalised values that stay below 10",
    now="a mean beyond 4 standard deviations is an error per dimension, beyond 3 a line of the agreement",
)
def test_a_dimension_that_lies_where_the_checkpoints_data_hardly_did_is_named(tmp_path: Path):
    # State a: mean 0.75, times 6 it is 4.5. State b: -0.25 by 6 is -1.5. Action a: mean 1.75 by 6 is 10.5,
    # and (10.5 - 0.5) / 2 = 5; action b likewise (1.75 by 6).
    base = write_checkpoint(tmp_path / "base")
    card = write_card(tmp_path / "data", scale=6.0)
    with pytest.raises(EmbodimentError) as error:
        start(recipe_of(card, base, {}))
    text = str(error.value)
    assert "normalised state.a" in text and "mean 4.5" in text and "normalised action.a" in text
    assert "normalised state.b" not in text and "order" in text
    start(recipe_of(card, base, {"outside": ("state.a", "action.a", "action.b")}))
    start(recipe_of(card, base, {}, statistics="data"))
    # 0.75 by 4.6 is 3.45: reported, and no error; actions have (1.75 by 4.6 - 0.5) / 2 = 3.8
    initial = start(recipe_of(write_card(tmp_path / "less", scale=4.6), base, {}))
    assert initial.agreement is not None
    (item,) = [one for one in initial.agreement.items if one.name == "normalised state.a"]
    assert item.status == "differs" and "mean 3.4" in item.sides["dataset"]


def test_an_agreement_shows_how_far_each_dimension_goes(tmp_path: Path):
    initial = start(recipe_of(write_card(tmp_path / "data"), write_checkpoint(tmp_path / "base"), {}))
    assert initial.agreement is not None
    (item,) = [item for item in initial.agreement.items if item.name == "normalised action"]
    # 2.0 is the largest of the first (2 - 0.5) / 2 = 0.75; the second begins at (2 - 0.5) / 2 and falls
    assert item.sides["dataset"] == "joints: a 0.75, b 0.75"


@pytest.mark.case(
    section="data",
    report="loss of 1e14",
    user_has="a gripper that moves in 1 of 180 frames, under LeRobot's quantiles",
    now="fitted statistics have a floor: 49, not 2e8",
)
@pytest.mark.parametrize("method", ["lerobot_quantile", "lerobot_min_max", "lerobot_mean_std"])
def test_a_gripper_that_moves_in_one_of_180_frames_stays_within_fifty(method: Any):
    gripper = np.zeros((180, 1))
    gripper[90] = 1.0
    statistics = Statistics.of(gripper)
    largest = float(np.abs(Normaliser.fit(statistics, FLOORED[method]).encode(gripper)).max())
    assert largest == pytest.approx({"lerobot_quantile": 49, "lerobot_min_max": 1}.get(method, 13.4), abs=0.1)


def test_fitted_statistics_never_repeat_another_programs_formula_without_a_floor(tmp_path: Path):
    extra = {"q01": -np.ones(2), "q99": np.ones(2)}
    base = write_checkpoint(tmp_path / "base", normalisation="lerobot_quantile", **extra)
    card = write_card(tmp_path / "data")
    with h5py.File(card.parent / "joints" / "reach_demo.hdf5", "r+") as file:
        for number in range(EPISODES):
            actions = file[f"data/demo_{number}/actions"]
            actions[:, 1] = np.zeros(STEPS)  # type: ignore[index]
        file["data/demo_0/actions"][3, 1] = 1.0  # type: ignore[index]
    initial = start(recipe_of(card, base, {"outside": ("action.b",)}, statistics="data"))
    assert initial.codec.config.normalisation == "quantile"
    assert (
        "fitted statistics normalise by quantile, which has a floor; in the checkpoint lerobot_quantile"
        in (initial.report)
    )


# ------------------------------------------------------------------------------------------- kept and shown


def test_runs_and_checkpoints_keep_the_agreement_and_print_it(tmp_path: Path, capsys: pytest.CaptureFixture):
    from vlafit import config

    base = write_checkpoint(tmp_path / "base", cameras=("wrist", "front"))
    recipe = recipe_of(write_card(tmp_path / "data"), base, {"cameras": {"wrist": ""}})
    (tmp_path / "recipe.toml").write_text(config.dump(recipe))
    out = tmp_path / "run"
    assert (
        cli.main(["train", str(tmp_path / "recipe.toml"), "--out", str(out), "--train.report", "true"]) == 0
    )
    shown = capsys.readouterr().out
    assert "adapt.cameras leaves it empty" in shown and "camera slot 0" in shown
    last = out / "checkpoints" / "step_000001"
    kept = agreement.values.read(out)
    assert kept is not None and kept == agreement.values.read(last)
    assert "What data and checkpoint agreed on" in (out / "report.html").read_text()
    (last / "agreement.json").unlink()
    with pytest.raises(VlafitError, match="missing: agreement.json"):
        checkpoints.inspect(last)


def test_inspect_compares_a_checkpoint_with_a_card(tmp_path: Path, capsys: pytest.CaptureFixture):
    base = write_checkpoint(tmp_path / "base")
    fits, other = write_card(tmp_path / "fits"), write_card(tmp_path / "other", relative=BOTH)
    assert cli.main(["inspect", str(base), "--data", str(fits)]) == 0
    assert "relative actions" in capsys.readouterr().out
    assert cli.main(["inspect", str(base), "--data", str(other)]) == 1
    assert "conflict: relative actions" in capsys.readouterr().err
    assert cli.main(["inspect", str(base), "--protocol", "toy"]) == 2


def test_inspect_refuses_an_instruction_that_train_refuses_and_quotes_its_beginning(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    base, card = write_checkpoint(tmp_path / "base"), write_card(tmp_path / "data")
    with h5py.File(card.parent / "joints" / "reach_demo.hdf5", "r+") as file:
        told = " ".join(["reach"] * 5001)
        file["data"].attrs["problem_info"] = json.dumps({"language_instruction": told})
    assert cli.main(["inspect", str(base), "--data", str(card)]) == 2
    error = capsys.readouterr().err
    assert "the prompt 'reach reach" in error and "the policy takes " in error and len(error) < 700
    with pytest.raises(CodecError, match="the policy takes "):
        run(recipe_of(card, base, {}), tmp_path / "out")


def test_inspect_shows_all_that_train_compares_and_refuses_files_that_are_not_the_cards(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    base, card = write_checkpoint(tmp_path / "base"), write_card(tmp_path / "data")
    assert cli.main(["inspect", str(base), "--data", str(card)]) == 0
    shown = capsys.readouterr().out
    for item in (
        "statistics",
        "state and action normalisation",
        "prompt",
        "tokenizer",
        "chunk",
        "normalised action",
    ):
        assert f"\n{item} " in shown
    assert "…" not in shown
    other = card.with_name("other.toml")
    other.write_text(card.read_text().replace("height = 16", "height = 48"))
    assert cli.main(["inspect", str(base), "--data", str(other)]) == 2
    error = capsys.readouterr().err
    assert "(16, 16, 3)" in error and "(48, 16, 3)" in error
    shutil.move(card.parent / "joints", tmp_path / "elsewhere")
    assert cli.main(["inspect", str(base), "--data", str(card)]) == 0
    assert "the files were not compared" in " ".join(capsys.readouterr().out.split())


def test_every_camera_whose_frames_have_another_size_than_declared_is_named_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    shutil.copytree(FIXTURES / "lerobot_datasets" / "image", tmp_path / "set")
    path = tmp_path / "set" / "meta" / "info.json"
    info = json.loads(path.read_text())
    info["features"]["observation.images.wrist"]["shape"] = [32, 32, 3]
    path.write_text(json.dumps(info))
    base = write_checkpoint(tmp_path / "base", cameras=("front", "wrist"))
    assert cli.main(["inspect", str(base), "--data", str(tmp_path / "set")]) == 2
    error = capsys.readouterr().err
    assert "observation.images.wrist is (" in error and "(32, 32, 3)" in error and "info.json" in error
    assert "observation.images.front" not in error
    info["features"]["observation.images.front"]["shape"] = [32, 32, 3]
    path.write_text(json.dumps(info))
    with pytest.raises(DataError) as refused:
        start(recipe_of(tmp_path / "set", base, {}))
    assert all(f"observation.images.{name} is (" in str(refused.value) for name in ("front", "wrist"))


def test_a_resumed_run_keeps_its_agreement(tmp_path: Path):
    base = write_checkpoint(tmp_path / "base")
    recipe = recipe_of(write_card(tmp_path / "data"), base, {})
    run(recipe, tmp_path / "run")
    before = (tmp_path / "run" / "agreement.json").read_text()
    run(recipe, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "agreement.json").read_text() == before


# ------------------------------------------------------------------------------------- columns without names


@pytest.mark.case(
    section="data",
    report="actions come out in another order",
    user_has="a card whose columns are in another order than those of the run, and no names of dimensions",
    now="refused by train, inspect and `eval --data`, with both orders",
)
def test_columns_in_another_order_than_the_runs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    card = write_card(tmp_path / "data", labels="[]")
    out = tmp_path / "run"
    recipe = recipe_of(card, None, {})
    run(replace(recipe, train=replace(recipe.train, steps=1)), out)
    saved = out / "checkpoints" / "step_000001"
    words = ["--samples", "2", "--draws", "2", "--episodes", "reach_demo/demo_0"]
    command = ["eval", str(saved), "--data", str(card), *words, "--out", str(tmp_path / "offline")]
    assert cli.main(command) == 0
    assert "neither side names them: same order" in capsys.readouterr().out
    for keys, is_other in (
        ('["actions[:, 1]", "actions[:, 0]"]', True),
        ('["actions[:, ::-1]"]', True),
        ('["actions[:, 1::-1]"]', False),  # how wide it is, is not known before the files are open
        ('["actions[:, 1:]", "actions[:, :1]"]', True),
        ('["actions[:, 0]", "actions[:, 1]"]', False),
    ):
        other = card.with_name("other.toml")
        other.write_text(card.read_text().replace('["actions"]', keys))
        assert other.read_text() != card.read_text()
        sides = ("actions", keys[2:-2].replace('", "', " + "))
        told = cli.main(["inspect", str(out), "--data", str(other)])
        said = capsys.readouterr()
        assert told == int(is_other) and ("conflict: action columns" in said.err) == is_other
        assert all(side in said.out for side in sides)
        command = ["eval", str(saved), "--data", str(other), *words, "--out", str(tmp_path / f"of {keys}")]
        assert cli.main(command) == (2 if is_other else 0)
        said = capsys.readouterr()
        if is_other:
            assert "action columns" in said.err and all(side in said.err for side in sides)
            with pytest.raises(EmbodimentError, match="action columns"):
                start(recipe_of(other, saved, {}))
            start(recipe_of(other, saved, {"robot": True}, statistics="data"))
        else:
            start(recipe_of(other, saved, {}))


@pytest.mark.case(
    section="data",
    report="the robot moves one joint the wrong way after fine-tuning",
    user_has="a card that turns a sign, adds an offset or shifts actions, and a run whose card did not",
    now="refused by train, inspect and `eval --data`, with both sides; `adapt.conversion`, or "
    "`--confirm-conversion` of the evaluation, accepts it",
)
def test_values_that_are_computed_otherwise_than_the_runs_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    card = write_card(tmp_path / "data")
    out = tmp_path / "run"
    recipe = recipe_of(card, None, {})
    run(replace(recipe, train=replace(recipe.train, steps=1)), out)
    saved = out / "checkpoints" / "step_000001"
    for line, text in (
        (('"actions"], dim', '"actions"], scale = [1.02, 1.0], dim'), "times 1.02 in dimension 0"),
        (('"obs/at"], dim', '"obs/at"], offset = [0.05, 0.05], dim'), "plus 0.05"),
        (("[robot]", "[rows]\naction_shift = 1\n[robot]"), "that of row t+1"),
    ):
        other = card.with_name("other.toml")
        other.write_text(card.read_text().replace(*line))
        assert other.read_text() != card.read_text()
        assert cli.main(["inspect", str(out), "--data", str(other)]) == 1
        said = capsys.readouterr()
        assert "conversion" in said.err and text in said.out and "as in the files" in said.out
        with pytest.raises(EmbodimentError, match="conversion.*\n.*adapt. conversion = true"):
            start(recipe_of(other, saved, {}))
        start(recipe_of(other, saved, {"conversion": True}, statistics="data"))
        words = ["--samples", "2", "--draws", "2", "--episodes", "reach_demo/demo_0"]
        command = ["eval", str(saved), "--data", str(other), *words, "--out", str(tmp_path / f"of {text}")]
        assert cli.main(command) == 2
        assert text in (said := capsys.readouterr().err) and "--confirm-conversion" in said
        assert cli.main([*command, "--confirm-conversion"]) == 0
        assert text in capsys.readouterr().out
    start(recipe_of(card, saved, {}))
