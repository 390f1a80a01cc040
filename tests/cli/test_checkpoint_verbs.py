"""Checkpoints of other programs on the command line: looked at, turned from pickles, and fine-tuned."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import vlafit
from tests.train.world import tiny, write_dots
from tests.tuning.world import make_policy, rules
from vlafit import checkpoints, cli, config
from vlafit.checkpoints.formats.openpi import orbax
from vlafit.codec import train_word_tokenizer
from vlafit.recipe import AdaptRecipe, PolicyRecipe

FIXTURES = Path(__file__).parents[1] / "fixtures"
OPENPI, JAX, SMOLVLA = (FIXTURES / name for name in ("openpi_pi0", "openpi_jax/ckpt_pure", "lerobot_smolvla"))
TOLD = ["--config", "vision.heads=2", "--config", "chunk=6"]


def _json(capsys: pytest.CaptureFixture, *words: str) -> dict:
    assert cli.main(["inspect", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_inspect_asks_for_what_the_tensors_do_not_tell_and_takes_it(capsys: pytest.CaptureFixture):
    assert cli.main(["inspect", str(OPENPI)]) == 2
    error = capsys.readouterr().err
    for form in ("--config vision.heads=N", "--policy.config.vision.heads N", "config={'vision.heads': N}"):
        assert form in error
    assert "of inspect, eval, serve and export" in error
    for verb in ("inspect", "export", "eval", "serve"):  # the remedy is for those that have the option
        with pytest.raises(SystemExit):
            cli.main([verb, "--help"])
        assert "--config" in capsys.readouterr().out
    assert cli.main(["inspect", "pi05", "--size", "x"]) == 2
    assert "vlafit inspect pi0 --size pi05" in capsys.readouterr().err
    facts = _json(capsys, str(OPENPI), *TOLD)
    assert (facts["family"], facts["report"]["form"]) == ("pi0", "openpi")
    assert facts["report"]["unused"] == ["paligemma_with_expert.gemma_expert.lm_head.weight"]
    assert facts["parameters"] == sum(part["parameters"] for part in facts["parts"].values())
    assert cli.main(["inspect", str(OPENPI), "--config", "vision.haeds=2"]) == 2
    assert "did you mean 'heads'" in capsys.readouterr().err
    assert cli.main(["inspect", str(OPENPI), "--config", "vision.heads"]) == 2
    assert "not KEY=VALUE" in capsys.readouterr().err


def test_inspect_estimates_memory_for_the_dtype(capsys: pytest.CaptureFixture):
    full, half = (_json(capsys, str(OPENPI), *TOLD, "--dtype", d)["report"] for d in ("float32", "bfloat16"))
    assert full["bytes"] == 4 * full["parameters"]
    assert 2 * half["parameters"] < half["bytes"] < 0.75 * full["bytes"]
    assert cli.main(["inspect", str(OPENPI), *TOLD, "--dtype", "float61"]) == 2
    assert "float61" in capsys.readouterr().err


def test_inspect_reads_headers_alone_unless_it_is_asked_for_the_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    folder = Path(shutil.copytree(OPENPI, tmp_path / "copy"))
    raw = bytearray((folder / "model.safetensors").read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    raw[start:] = b"\xff" * (len(raw) - start)  # every number NaN, the header as it was
    (folder / "model.safetensors").write_bytes(raw)
    assert cli.main(["inspect", str(folder), *TOLD]) == 0
    assert "pi0" in capsys.readouterr().out
    assert cli.main(["inspect", str(folder), *TOLD, "--whole"]) == 2
    assert "not finite" in capsys.readouterr().err

    def read(leaf: orbax.Leaf) -> None:
        raise AssertionError(f"{leaf.name} was read")

    monkeypatch.setattr(orbax.Leaf, "read", read)
    monkeypatch.setattr(orbax.Leaf, "slices", read)
    assert _json(capsys, str(JAX), "--config", "chunk=6")["report"]["form"] == "openpi JAX"


def test_inspect_shows_adapters_and_what_another_strategy_would_train(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    policy = make_policy()
    plan = vlafit.apply_strategy(policy, rules("lora"))
    vlafit.save_checkpoint(policy, tmp_path / "adapted", plan=plan)
    assert cli.main(["inspect", str(tmp_path / "adapted"), "--strategy", "expert"]) == 0
    shown = capsys.readouterr().out
    assert "note: adapter lora: lora on" in shown
    assert "strategy expert" in shown and "frozen" in shown
    whole = _json(capsys, str(tmp_path / "adapted"), "--whole")
    assert whole["report"]["notes"] == list(checkpoints.inspect(tmp_path / "adapted").report.notes)


def test_a_pickle_is_refused_converted_and_then_loaded(tmp_path: Path, capsys: pytest.CaptureFixture):
    tensors = load_file(OPENPI / "model.safetensors")
    torch.save({"model": tensors, "step": 3}, tmp_path / "weights.pt")
    assert cli.main(["inspect", str(tmp_path / "weights.pt"), *TOLD]) == 2
    assert "vlafit convert-pickle" in capsys.readouterr().err
    words = ["convert-pickle", str(tmp_path / "weights.pt"), "--out", str(tmp_path / "model.safetensors")]
    assert cli.main(words) == 2
    assert "--key model" in capsys.readouterr().err
    assert cli.main([*words, "--key", "model"]) == 0
    assert f"{len(tensors)} tensors" in capsys.readouterr().out
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == tensors.keys() and all(torch.equal(written[n], tensors[n]) for n in tensors)
    assert _json(capsys, str(tmp_path / "model.safetensors"), *TOLD)["family"] == "pi0"
    assert cli.main([*words, "--key", "model"]) == 2
    assert "exists already" in capsys.readouterr().err


class _Program:
    def __reduce__(self):
        return (Path.touch, (Path("was_run"),))


def test_a_pickle_that_holds_a_program_is_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.ones(2), "x": _Program()}, "bad.pt")
    assert cli.main(["convert-pickle", "bad.pt", "--out", "good.safetensors"]) == 2
    assert "not a pickle" in capsys.readouterr().err
    assert not Path("was_run").exists() and not Path("good.safetensors").exists()


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dots(tmp_path_factory.mktemp("data"))


def _trained(
    card: Path, policy: PolicyRecipe, folder: Path, capsys: pytest.CaptureFixture, adapt: AdaptRecipe
) -> list[str]:
    """Train two steps from the checkpoint, and return the lines of the load report that the run keeps."""
    recipe = tiny(
        card,
        data={"statistics": "data"},
        optim={"ema": 0.0},
        train={"steps": 2, "batch_size": 2, "draws": 1, "validate_every": 0, "save_every": 2},
    )
    (folder / "recipe.toml").write_text(config.dump(replace(recipe, policy=policy, adapt=adapt)))
    assert cli.main(["train", str(folder / "recipe.toml"), "--out", str(folder / "run")]) == 0
    shown = capsys.readouterr().out
    told = json.loads((folder / "run" / "run.json").read_text())["load_report"]
    assert told in shown
    return told.splitlines()


def test_openpis_checkpoint_learns_another_robot_and_the_report_says_what_was_adapted(
    card: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    folder = Path(shutil.copytree(OPENPI, tmp_path / "smolvla_pi05"))  # a folder's name tells nothing
    (folder / "openpi_config.json").rename(folder / "config.json")  # its name where openpi writes it
    told: dict[str, object] = {"vision.heads": 2, "action_dim": 34, "state_dim": 8, "chunk": 4}
    refused = config.dump(replace(tiny(card), policy=PolicyRecipe(checkpoint=str(folder), config=told)))
    (tmp_path / "refused.toml").write_text(refused)
    assert cli.main(["train", str(tmp_path / "refused.toml"), "--out", str(tmp_path / "refused")]) == 2
    assert "Say what becomes of them: resize='keep'" in capsys.readouterr().err
    train_word_tokenizer([f"number {n} and {n * n}" for n in range(400)], 500).save(tmp_path / "words")
    policy = PolicyRecipe(
        checkpoint=str(folder), config=told, resize="keep", tokenizer=str(tmp_path / "words")
    )
    slots = {"base_0_rgb": "front", "left_wrist_0_rgb": "", "right_wrist_0_rgb": ""}
    report = _trained(card, policy, tmp_path, capsys, AdaptRecipe(cameras=slots))
    assert report[0] == f"{folder}: openpi checkpoint of pi0, loaded in float32"
    assert [line for line in report if line.startswith("adapted")] == [
        "adapted: chunk: 4 actions at once, 6 in the checkpoint",
        "adapted: state_dim: 8, 32 in the checkpoint",
        "adapted: action_dim: 34, 32 in the checkpoint",
        "adapted: action_in_proj.weight: padded with zeros, (48, 32) to (48, 34)",
        "adapted: action_out_proj.weight: padded with zeros, (32, 48) to (34, 48)",
        "adapted: action_out_proj.bias: padded with zeros, (32,) to (34,)",
        "adapted: state_proj.weight: sliced, (48, 32) to (48, 8)",
        "adapted: cameras front, (none), (none)",
    ]
    made, codec, _, _ = vlafit.load_checkpoint(tmp_path / "run" / "checkpoints" / "step_000002")
    assert (made.config.action_dim, made.config.state_dim, made.config.chunk) == (34, 8, 4)
    assert codec is not None and codec.config.cameras == ("front", "", "")


def test_lerobots_checkpoint_learns_another_robot_with_fresh_projections(
    card: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    folder = Path(shutil.copytree(SMOLVLA, tmp_path / "pi0_base"))
    told: dict[str, object] = {"action_dim": 8, "chunk": 5}
    policy = PolicyRecipe(checkpoint=str(folder), config=told, resize="fresh")
    adapt = AdaptRecipe(cameras={"cam_high": "front", "cam_wrist": ""}, resize=True, robot=True)
    report = _trained(card, policy, tmp_path, capsys, adapt)
    assert report[0] == f"{folder}: LeRobot checkpoint of smolvla, loaded in float32"
    anew = "action_in_proj.weight, action_out_proj.weight, action_out_proj.bias"
    assert f"fresh (3): {anew}" in report
    adapted = [line.removeprefix("adapted: ") for line in report if line.startswith("adapted")]
    assert adapted[:2] == [
        "chunk: 5 actions at once, 10 in the checkpoint",
        "action_dim: 8, 32 in the checkpoint",
    ]
    assert all(": fresh, (" in line for line in adapted[2:5])
    assert adapted[5:] == [
        "fitted statistics normalise by mean_std, which has a floor; in the checkpoint lerobot_mean_std",
        "cameras front, (none), in the checkpoint cam_high, cam_wrist",
    ]


def test_inspect_forecasts_the_memory_to_train_and_names_what_fits(capsys: pytest.CaptureFixture):
    words = ["inspect", "metaworld-base", "--strategy", "expert", "--batch", "1"]
    assert cli.main([*words, "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert (memory["batch"], memory["cameras"], memory["precision"]) == (1, 1, "bf16")
    first = memory["rungs"][0]
    assert first["total"] == first["weights"] + first["optimiser"] + max(first["step"], first["gradients"])
    assert set(memory["fits"]) == {"16", "24", "48", "80", "141"}
    assert "--train.recompute none" in memory["fits"]["16"]["options"]
    assert cli.main(["inspect", "metaworld-base", "--batch", "4"]) == 2
    assert "--batch 4: needs --strategy" in capsys.readouterr().err
