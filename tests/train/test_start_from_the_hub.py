"""A run starts from LeRobot's checkpoints as they lie on the Hub, and `inspect` says what it needs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from tests.checkpoints.test_export_adapters import trained
from tests.train.agreement_world import recipe_of, write_card
from tests.train.test_agreement import SMOLVLA, start
from vlafit import checkpoints, cli, config
from vlafit.actor import load_actor
from vlafit.checkpoints.export import export
from vlafit.cli.verbs.inspect import needed_to_train
from vlafit.codec import train_word_tokenizer
from vlafit.errors import CodecError, ConfigError, VlafitError, WeightsError
from vlafit.recipe import Recipe
from vlafit.train.data import open_data
from vlafit.train.preflight import meta_policy
from vlafit.train.step_zero import load_untrained
from vlafit.types import EpisodeKey, Observation

FITS = {"cameras": {"cam_high": "front", "cam_wrist": ""}, "resize": True}


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_card(tmp_path_factory.mktemp("data"), size=40)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolVLA for a robot of two joints; its processors hold two datasets' statistics and no tokenizer."""
    folder = Path(shutil.copytree(SMOLVLA, tmp_path_factory.mktemp("base") / "smolvla"))
    values = json.loads((folder / "config.json").read_text())
    values["input_features"]["observation.state"]["shape"] = [2]
    values["output_features"]["action"]["shape"] = [2]
    (folder / "config.json").write_text(json.dumps(values))
    shutil.rmtree(folder / "tokenizer")
    values = json.loads((folder / "policy_preprocessor.json").read_text())
    values["steps"][3].pop("artifacts")
    (folder / "policy_preprocessor.json").write_text(json.dumps(values))
    for path in folder.glob("policy_*processor.json"):
        values = json.loads(path.read_text())
        for features in [s["config"]["features"] for s in values["steps"] if "features" in s["config"]]:
            for name in {"observation.state", "action"} & set(features):
                features[name]["shape"] = [2]
        path.write_text(json.dumps(values))
    for path in folder.glob("policy_*normalizer_processor.safetensors"):
        tensors = {
            n: t[:2].clone() for n, t in load_file(path).items() if n.split(".")[-1] in ("mean", "std")
        }
        for name in tensors:  # statistics under which the card's values are not extreme
            tensors[name].fill_(0.5 if name.endswith("mean") else 1.0)
        owners = {"so100": 1.0, "so101": 2.0}
        save_file({f"{o}.buffer.{n}": f * t for o, f in owners.items() for n, t in tensors.items()}, path)
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer of the embedding's size."""
    folder = tmp_path_factory.mktemp("words")
    train_word_tokenizer([f"number {n} and {n * n}" for n in range(400)], 500).save(folder)
    return str(folder)


def recipe(card: Path, checkpoint: Path, statistics: str, **policy: object) -> Recipe:
    made = recipe_of(card, checkpoint, FITS, statistics=statistics)
    return replace(made, policy=replace(made.policy, **policy))


@pytest.mark.case(
    section="checkpoints",
    report="`inspect` says yes, `train` says no",
    user_has="a checkpoint without statistics or tokenizer",
    now="`inspect` lists the settings without which `train` refuses",
)
def test_inspect_names_what_training_refuses_to_begin_without(card: Path, base: Path, words: str):
    needed = needed_to_train(checkpoints.inspect(base), base, None)
    assert len(needed) == 2
    assert all(fact in needed[0] for fact in ('data.statistics = "data"', "policy.assets", "so100, so101"))
    assert "policy.tokenizer" in needed[1]
    with pytest.raises(ConfigError) as caught:
        start(recipe(card, base, "checkpoint", tokenizer=words))
    assert all(fact in str(caught.value) for fact in ("so100", "assets", 'data.statistics = "data"'))
    with pytest.raises(ConfigError, match="policy.tokenizer"):
        start(recipe(card, base, "data"))


def test_inspect_takes_the_tokenizer_that_training_takes_and_refuses_the_one_that_it_refuses(
    card: Path, tmp_path: Path, words: str, capsys: pytest.CaptureFixture
):
    """Without processors it makes no codec: `inspect` said that it would have no effect."""
    bare = Path(shutil.copytree(SMOLVLA, tmp_path / "bare"))
    for path in bare.glob("policy_*"):
        path.unlink()
    shutil.rmtree(bare / "tokenizer")
    assert cli.main(["inspect", str(bare), "--tokenizer", words]) == 0
    small = tmp_path / "small"
    train_word_tokenizer(["pick up the cube"], 280).save(small)
    assert cli.main(["inspect", str(bare), "--tokenizer", str(small)]) == 2
    said = capsys.readouterr().err
    with pytest.raises(CodecError) as caught:
        start(recipe(card, bare, "data", tokenizer=str(small)))
    assert str(caught.value) in said and str(small) in said


@pytest.mark.parametrize("given", [False, True])
def test_a_small_tokenizer_that_the_checkpoint_holds_is_a_line_whoever_names_it(
    given: bool, card: Path, base: Path, tmp_path: Path
):
    """It has 106 tokens for 512 rows: refused as policy.tokenizer, and taken from the folder in silence."""
    held = Path(shutil.copytree(base, tmp_path / "held"))
    shutil.copytree(SMOLVLA / "tokenizer", held / "tokenizer")
    elsewhere = shutil.copytree(SMOLVLA / "tokenizer", tmp_path / "elsewhere")
    named = {"tokenizer": str(elsewhere)} if given else {}
    agreement = start(recipe(card, held, "data", **named)).agreement
    assert agreement is not None
    (item,) = [item for item in agreement.items if item.name == "tokenizer"]
    assert item.status == "differs" and "106 tokens" in item.value
    assert item.sides == {"checkpoint": "an embedding of 512 rows"}
    with pytest.raises(CodecError, match="106 tokens, the pretrained embedding 512 rows"):
        start(recipe(card, base, "data", tokenizer=str(elsewhere)))


@pytest.mark.case(
    section="checkpoints",
    report="a base model cannot be fine-tuned",
    user_has="processors without statistics of one robot",
    now='`data.statistics = "data"` fits them; prompts and frames stay those of LeRobot',
)
def test_statistics_of_the_data_train_with_lerobots_prompts_and_frames(card: Path, base: Path, words: str):
    initial = start(recipe(card, base, "data", tokenizer=words))
    config = initial.codec.config
    assert (config.prompt, config.framing, config.special_tokens) == ("line", "smolvla", "tokenizer")
    assert np.allclose(initial.codec.statistics["state"].mean, [0.75, -0.25], atol=1e-6)


@pytest.mark.case(
    section="runs",
    report="a base model cannot be evaluated before fine-tuning",
    user_has="a LeRobot or openpi folder without statistics, cameras or tokenizer of one robot",
    now="`vlafit eval` and `vlafit serve` with `--recipe` take them from the recipe of its fine-tuning",
)
def test_a_base_model_is_evaluated_with_the_recipe_that_would_fine_tune_it(
    card: Path, base: Path, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(ConfigError, match=r"has no codec.*--recipe RECIPE"):
        load_actor(base)
    made = recipe(card, base, "data", tokenizer=words)
    actor = load_untrained(made, str(base), steps=2, width=1)
    initial = start(made)
    assert actor.codec.config == initial.codec.config and actor.embodiment == initial.codec.embodiment
    assert (actor.codec.statistics["action"].mean == initial.codec.statistics["action"].mean).all()
    seen = Observation({"front": np.full((40, 40, 3), 7, np.uint8)}, np.zeros(2, np.float32), "reach out")
    (chunk,) = actor.act([seen], [EpisodeKey(0, "reach", 0)])
    assert chunk.actions.shape[1] == 2 and np.isfinite(chunk.actions).all()
    other = replace(made, data=replace(made.data, validation=0.5))
    assert load_untrained(other, str(base), steps=2, width=1).fingerprint() != actor.fingerprint()
    narrow = load_untrained(made, str(base), steps=2, width=1, dtype="bfloat16")
    assert narrow.fingerprint() == actor.fingerprint().replace("steps=2", "steps=2 dtype=bfloat16")

    (tmp_path / "recipe.toml").write_text(config.dump(made))
    command = ["eval", str(base), "--data", str(card), "--samples", "4", "--draws", "2", "--steps", "1"]
    out = tmp_path / "eval"
    assert cli.main([*command, "--out", str(out)]) == 2
    assert "--recipe RECIPE" in capsys.readouterr().err and not out.exists()
    assert cli.main([*command, "--out", str(out), "--recipe", str(tmp_path / "recipe.toml")]) == 0
    assert "episodes of joints" in capsys.readouterr().out and list(out.glob("*.html"))


@pytest.mark.parametrize(("name", "mean"), [("so100", 0.5), ("so101", 1.0)])
def test_a_dataset_is_chosen_by_name(card: Path, base: Path, words: str, name: str, mean: float):
    initial = start(recipe(card, base, "checkpoint", tokenizer=words, assets=name))
    assert initial.codec.statistics["state"].mean.tolist() == [mean, mean]
    assert initial.codec.statistics["action"].mean.tolist() == [mean, mean]
    assert initial.agreement is not None
    (item,) = [item for item in initial.agreement.items if item.name == "statistics"]
    assert item.value == f"{name} of the checkpoint" and f'policy.assets = "{name}"' in item.reason


def test_a_dataset_that_is_not_there_is_refused_with_the_names_that_are(card: Path, base: Path, words: str):
    with pytest.raises(WeightsError, match="'so10', but of so100, so101"):
        start(recipe(card, base, "checkpoint", tokenizer=words, assets="so10"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """LoRA on transformers' pi0, and the base, which is not in its folder."""
    folder = tmp_path_factory.mktemp("adapter")
    export(trained("lora", folder), "transformers", folder / "out")
    shutil.move(folder / "out" / "base", folder / "elsewhere")
    return folder / "out", folder / "elsewhere"


@pytest.mark.case(
    section="checkpoints",
    report="an adapter cannot be trained on",
    user_has="a PEFT folder whose base is elsewhere",
    now="`policy.base` in a recipe, `--base` on the command line",
)
def test_an_adapter_whose_base_is_elsewhere_is_trained_on_once_the_recipe_names_it(
    card: Path, adapter: tuple[Path, Path], tmp_path: Path
):
    folder, below = adapter
    vocabulary = checkpoints.inspect(below).policy.needs().vocabulary
    sentences = [f"number {n} and {n * n}" for n in range(200)]
    train_word_tokenizer(sentences, vocabulary).save(tmp_path / "words")
    made = recipe(card, folder, "data", tokenizer=str(tmp_path / "words"))
    made = replace(made, adapt=replace(made.adapt, cameras={}))
    with pytest.raises(WeightsError, match="policy.base in a recipe"):
        start(made)
    given = replace(made, policy=replace(made.policy, base=str(below)))
    assert meta_policy(given, open_data(given.data, 0)).config == checkpoints.inspect(below).policy.config
    initial = start(given)
    assert "adapters of peft" in initial.report and initial.base is None
    assert any("merged into its weights" in warning for warning in initial.warnings)


def test_a_base_below_a_checkpoint_without_adapters_has_no_effect_and_is_refused(
    card: Path, base: Path, words: str
):
    with pytest.raises(VlafitError, match="base=.* only applies to a checkpoint that sits on another"):
        start(recipe(card, base, "data", tokenizer=words, base=str(SMOLVLA)))
