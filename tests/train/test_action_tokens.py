"""A small pi0-FAST: the run fits its action tokenizer, validates decoded actions, resumes to the last bit."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from tests.checkpoints import test_openpi_fast
from tests.checkpoints.orbax_folder import write_orbax
from tests.checkpoints.pi0_fast_folder import RECORDED
from tests.train.world import assert_same, learned, losses, metrics, tiny
from vlafit import checkpoints
from vlafit.actor import load_actor
from vlafit.agreement import INVALID, Agreement, Item
from vlafit.agreement.values import read
from vlafit.codec import Codec, fast
from vlafit.datasets import load_card
from vlafit.errors import ConfigError
from vlafit.nn.batch import Batch
from vlafit.nn.rng import SampleRng
from vlafit.recipe import Recipe
from vlafit.train import run
from vlafit.train.action_chunks import faults_of
from vlafit.train.action_tokenizer import PUBLIC, Origin
from vlafit.train.data import open_data
from vlafit.train.frozen import FrozenWeights
from vlafit.train.initial_policy import initialise
from vlafit.tuning import load_strategy
from vlafit.types import EpisodeKey, Observation

POLICY = {"family": "pi0_fast", "size": "pi0-fast-tiny", "config": {}}


def tokens(card: Path, **sections: dict[str, Any]) -> Recipe:
    train = {"steps": 6, "validate_every": 3, "save_every": 3, "keep": 3, "draws": 1}
    sections["policy"] = POLICY | sections.get("policy", {})
    sections["train"] = train | sections.get("train", {})
    return tiny(card, **sections)


def item_of(agreement: Agreement | None) -> Item:
    assert agreement is not None
    return next(item for item in agreement.items if item.name == "action tokenizer")


@pytest.fixture(scope="module")
def finished(card: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody interrupted; nobody may change it."""
    out = tmp_path_factory.mktemp("tokens") / "run"
    assert run(tokens(card), out).finished
    return out


def test_the_run_learns_and_reports_how_many_answers_are_actions(finished: Path) -> None:
    history = losses(finished)
    assert list(history) == list(range(1, 7)) and all(np.isfinite(list(history.values())))
    validated = [event for event in metrics(finished) if "validation/loss" in event]
    assert [event["step"] for event in validated] == [0, 3, 6]
    assert validated[-1]["validation/loss"] < validated[0]["validation/loss"]
    for event in validated:
        assert 0 <= event["validation/valid_actions"] <= 1 and event["validation/action_error"] > 0
        assert 0 <= event["validation/token_accuracy"] <= 1


def test_the_checkpoint_holds_the_fitted_action_tokenizer(finished: Path) -> None:
    loaded = checkpoints.load_all(finished / "checkpoints" / "step_000006")
    assert loaded.codecs is not None
    codec = next(iter(loaded.codecs))
    assert codec.action_tokenizer is not None and codec.action_text is not None
    rng = np.random.default_rng(0)
    chunk = rng.normal(0, 0.5, (codec.config.chunk, codec.embodiment.action.shape[0]))
    ids = codec.action_text.encode(chunk)
    answer = codec.detokenise(np.array(ids))
    width = chunk.shape[1]
    assert answer.valid and np.abs(answer.chunk[:, :width] - chunk).max() < 0.5
    assert not answer.chunk[:, width:].any()


def test_an_actor_executes_what_the_tokens_stand_for_and_counts_answers_that_are_no_chunk(
    finished: Path,
) -> None:
    actor = load_actor(finished / "checkpoints" / "step_000006", width=4)
    codec, robot = actor.codec, actor.embodiment
    rng = np.random.default_rng(4)
    pictures = {camera.name: rng.integers(0, 256, camera.shape, np.uint8) for camera in robot.cameras}
    state = rng.normal(size=robot.state.shape).astype(np.float32)
    observations = [
        Observation(pictures, state, f"move {word}") for word in ("left", "right", "up", "on", "back")
    ]
    keys = [EpisodeKey(number, "dots", 0) for number in range(5)]
    answers: list[np.ndarray] = []
    act = actor.policy.act

    def watched(batch: Batch, rng: SampleRng) -> Tensor:
        answers.extend((answer := act(batch, rng)).numpy())
        return answer

    actor.policy.act = watched  # type: ignore[method-assign]
    chunks = actor.act(observations, keys)
    decoded = [codec.detokenise(row) for row in answers]  # the last three fill the second batch
    assert len(decoded) == 8 and (actor.answers, len(chunks)) == (5, 5)
    assert actor.invalid_answers == sum(not row.valid for row in decoded[:5])
    assert actor.fate_of_invalid == "0 (normalised)"
    for chunk, row, observation in zip(chunks, decoded[:5], observations, strict=True):
        assert chunk.valid is row.valid
        assert np.array_equal(chunk.actions, codec.decode(row.chunk, observation).actions)


def test_a_run_that_resumes_from_its_middle_ends_with_the_same_bits(
    finished: Path, card: Path, tmp_path: Path
) -> None:
    """The checkpoint of step 3 is the newest, as after an interruption before step 6."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "checkpoints" / "step_000006")
    for pointer in (out / "checkpoints").iterdir():
        if pointer.is_file() or pointer.is_symlink():
            pointer.unlink()
    assert run(tokens(card), out, resume=True).finished
    assert_same(learned(out, 6), learned(finished, 6))
    folders = [folder / "checkpoints" / "step_000006" for folder in (out, finished)]
    names = [sorted(path.name for path in folder.rglob("*") if path.is_file()) for folder in folders]
    assert names[0] == names[1]
    assert losses(out) == losses(finished)


def test_a_given_action_tokenizer_is_used_and_the_checkpoints_own_is_kept(
    finished: Path, card: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "fast"
    folder.mkdir()
    fast.fit([np.random.default_rng(1).normal(0, 1, (4, 2)) for _ in range(50)], 270).save(folder)
    short = {"steps": 1, "validate_every": 0, "save_every": 0}
    out = tmp_path / "run"
    run(tokens(card, policy={"action_tokenizer": str(folder)}, train=short), out)
    loaded = checkpoints.load_all(out / "checkpoints" / "step_000001")
    assert loaded.codecs is not None
    used = next(iter(loaded.codecs)).action_tokenizer
    assert used is not None and used.backend.to_str() == fast.load(folder).backend.to_str()
    assert item_of(read(finished)).value.startswith("FAST (fitted to the data), ")
    own = finished / "checkpoints" / "step_000006"
    again = tokens(card, policy={"family": "", "size": "", "checkpoint": str(own)}, train=short)
    kept = initialise(again, open_data(again.data, 0), FrozenWeights(load_strategy("full"), wanted=False))
    assert item_of(kept.agreement).value.startswith("FAST (the checkpoint's), ")
    copy = tmp_path / "copy"  # of the checkpoint's own: naming it changes nothing
    shutil.copytree(own / "action_tokenizer", copy)
    named = replace(again, policy=replace(again.policy, action_tokenizer=str(copy)))
    same = initialise(named, open_data(named.data, 0), FrozenWeights(load_strategy("full"), wanted=False))
    assert item_of(same.agreement) == item_of(kept.agreement)
    chosen = {"family": "", "size": "", "checkpoint": str(own), "action_tokenizer": str(folder)}
    with pytest.raises(ConfigError, match="action_tokenizer") as caught:
        run(tokens(card, policy=chosen, train=short), tmp_path / "other")
    assert str(folder) in str(caught.value)


def test_openpis_checkpoint_takes_the_recipes_action_tokenizer(card: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    write_orbax(folder / "params", test_openpi_fast.tree())
    robot = load_card(card).embodiment
    width = {"state": robot.state.shape[0], "actions": robot.action.shape[0]}
    ends = {"mean": 0.0, "std": 1.0, "q01": -1.0, "q99": 1.0}
    numbers = {key: {name: [end] * n for name, end in ends.items()} for key, n in width.items()}
    (folder / "assets" / "dots").mkdir(parents=True)
    (folder / "assets" / "dots" / "norm_stats.json").write_text(json.dumps({"norm_stats": numbers}))
    fast_folder = RECORDED / "fast_tokenizer"
    policy = {
        "family": "", "size": "", "checkpoint": str(folder), "assets": "dots",
        "tokenizer": str(RECORDED / "text_tokenizer"), "action_tokenizer": str(fast_folder),
        "config": test_openpi_fast.TOLD,
    }  # fmt: skip
    adapt = {"cameras": {"base_0_rgb": robot.cameras[0].name, "base_1_rgb": "", "wrist_0_rgb": ""}}
    recipe = tokens(card, policy=policy, adapt=adapt, data={"statistics": "checkpoint"})
    made = initialise(recipe, open_data(recipe.data, 0), FrozenWeights(load_strategy("full"), wanted=False))
    assert made.codec.action_tokenizer is not None
    chunk = np.zeros((10, 3))
    assert made.codec.action_tokenizer.encode(chunk) == fast.load(fast_folder).encode(chunk)
    item = item_of(made.agreement)  # it was called the checkpoint's
    assert item.status == "differs" and f"FAST ({fast_folder}), " in item.value
    assert item.sides == {"checkpoint": f"{PUBLIC}, 2048 tokens", "recipe": str(fast_folder)}
    assert (
        f'policy.action_tokenizer = "{PUBLIC}"' in item.reason and "anew what each token means" in item.reason
    )
    other = {**test_openpi_fast.TOLD, "codec.action_tokenizer": "elsewhere"}
    with pytest.raises(ConfigError, match=r"policy.action_tokenizer is .*config.codec.action_tokenizer"):
        both = replace(recipe, policy=replace(recipe.policy, config=other))
        initialise(both, open_data(both.data, 0), FrozenWeights(load_strategy("full"), wanted=False))


def test_one_that_is_fitted_takes_the_place_of_the_checkpoints_with_a_line(
    finished: Path, card: Path
) -> None:
    own = finished / "checkpoints" / "step_000006"
    chosen = {"family": "", "size": "", "checkpoint": str(own), "action_tokenizer": "fit"}
    before = checkpoints.load_all(own).codecs
    assert before is not None
    old = next(iter(before))
    narrow = {name: replace(one, q01=one.q01 / 4, q99=one.q99 / 4) for name, one in old.statistics.items()}
    wide = {name: replace(one, q01=one.q01 * 4, q99=one.q99 * 4) for name, one in old.statistics.items()}
    for statistics in ("data", "checkpoint"):
        recipe = tokens(card, policy=chosen, data={"statistics": statistics})
        data = open_data(recipe.data, 3)
        made = initialise(recipe, data, FrozenWeights(load_strategy("full"), wanted=False))
        item, codec = item_of(made.agreement), made.codec
        assert item.status == "differs" and item.value.startswith("FAST (fitted to the data), ")
        assert item.sides == {"checkpoint": "its own", "recipe": "fit"} and "anew" in item.reason
        assert not made.warnings and codec.action_tokenizer is not None
        # The same data and statistics, so the same coefficients; but the ids need not be free of words.
        assert codec.action_tokenizer.min_token == old.action_tokenizer.min_token
    # Warnings are of the statistics that hold: they were of those that would be fitted to the data.
    # The fitted tokenizer has a token for every byte, but raises what is below its least coefficient.
    recorded = fast.load(RECORDED / "fast_tokenizer")
    for numbers, tokenizer, lost in (
        (narrow, old.action_tokenizer, True),
        (wide, old.action_tokenizer, False),
        (narrow, recorded, True),
    ):
        other = Codec(old.config, old.embodiment, numbers, old.tokenizer, None, tokenizer)
        warned = faults_of(data.parts(), [other])
        assert any("has no token for" in warning for warning in warned) == lost, warned


@pytest.mark.parametrize(
    ("stated", "name", "size", "status"),
    [
        ("", "mine", 300, "assumed"),  # a pi0.5 whose files say nothing of tokens
        (PUBLIC, "a/copy/of/it", 2048, "assumed"),
        (PUBLIC, PUBLIC, 2048, "same"),
        (PUBLIC, "mine", 300, "differs"),
        ("lerobot/fast-action-tokenizer", "mine", 300, "assumed"),
    ],
)
def test_what_a_given_action_tokenizer_means_to_pretrained_weights_is_said(
    stated: str, name: str, size: int, status: str, finished: Path
) -> None:
    codecs = checkpoints.load_all(finished / "checkpoints" / "step_000006").codecs
    assert codecs is not None
    text = next(iter(codecs)).action_text
    assert text is not None
    tokenizer = fast.fit([np.random.default_rng(1).normal(0, 0.1, (4, 2)) for _ in range(50)], 270)
    text = replace(text, actions=tokenizer, config=replace(text.config, vocabulary=4096))
    words = [f"<{number}>" for number in range(size - tokenizer.vocab_size)]
    tokenizer.backend.add_tokens(words)
    item = Origin(name, False, True, stated).item(text)
    assert item.status == status and f"FAST ({name}), {size} tokens" in item.value
    assert ("step 0" in item.reason) == (status == "assumed")
    assert Origin(name, False, False, stated).item(text).status == "same"  # fresh weights know no token yet


def test_an_action_tokenizer_for_a_policy_that_predicts_numbers_is_refused(
    card: Path, tmp_path: Path
) -> None:
    recipe = tiny(card)
    recipe = replace(recipe, policy=replace(recipe.policy, action_tokenizer="somewhere"))
    with pytest.raises(ConfigError, match=r"policy\.action_tokenizer 'somewhere' has no effect"):
        run(recipe, tmp_path / "run")


def test_the_agreement_says_what_the_robot_executes_where_an_answer_is_no_chunk(finished: Path) -> None:
    agreed = read(finished)
    assert agreed is not None
    item = next(item for item in agreed.items if item.name == INVALID)
    assert item.value == "0 (normalised)"
