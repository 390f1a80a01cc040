"""What a run trains, keeps and writes."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.train.world import assert_same, learned, losses, metrics, tiny
from vlafit import checkpoints
from vlafit.datasets import ChunkDataset
from vlafit.recipe import OptimRecipe, Recipe
from vlafit.train import dataloader, run
from vlafit.train.data import open_data
from vlafit.train.dataloader import EncodedSamples
from vlafit.train.ema import Ema
from vlafit.train.experiment import build
from vlafit.train.live_bytes import LiveBytes
from vlafit.train.loop import NotFinite
from vlafit.train.optim import build_optimizer, schedule
from vlafit.types import Sample

CPU = torch.device("cpu")


def split(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Sort what `learned` returns by its first word."""
    kinds: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        kinds.setdefault(kind, {})[name] = value
    return kinds


# ---------------------------------------------------------------------------------- what learns, what stays


def test_training_lowers_the_loss_on_held_out_episodes(card: Path, tmp_path: Path) -> None:
    train = {"steps": 60, "validate_every": 0, "save_every": 0, "log_every": 60}
    run(tiny(card, train=train, optim={"lr": 1e-2}), tmp_path / "run")
    first, last = (e["validation/loss"] for e in metrics(tmp_path / "run") if "validation/loss" in e)
    assert last < 0.7 * first


def test_what_the_strategy_freezes_is_bit_identical_and_has_no_optimiser_state(
    card: Path, tmp_path: Path
) -> None:
    recipe = tiny(card, strategy="expert", train={"steps": 3, "save_every": 0})
    start = dict(build(recipe, CPU).policy.named_parameters())
    run(recipe, tmp_path / "run")
    kinds = split(learned(tmp_path / "run", 3))
    trained = set(build(recipe, CPU).plan.trainable)
    assert 0 < len(trained) < len(start)
    for kind in ("weight", "ema", "adamw.step", "adamw.exp_avg", "adamw.exp_avg_sq"):
        assert set(kinds[kind]) == trained
    assert set(kinds["exported"]) == set(start)
    for name, value in kinds["exported"].items():
        assert value.equal(start[name]) == (name not in trained), name


def test_the_optimiser_holds_exactly_the_trainable_parameters(card: Path) -> None:
    experiment = build(tiny(card, strategy="expert"), CPU)
    optimizer = build_optimizer(experiment.policy, experiment.plan, OptimRecipe())
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in experiment.policy.parameters() if p.requires_grad)


def test_the_moving_average_is_what_is_exported(whole: Path) -> None:
    kinds = split(learned(whole, 8))
    assert set(kinds["ema"]) == set(kinds["weight"])
    for name, average in kinds["ema"].items():
        assert kinds["exported"][name].equal(average)
    assert any(not kinds["weight"][name].equal(average) for name, average in kinds["ema"].items())


def test_without_a_moving_average_the_weights_are_exported(card: Path, tmp_path: Path) -> None:
    run(tiny(card, optim={"ema": 0.0}, train={"steps": 2}), tmp_path / "run")
    kinds = split(learned(tmp_path / "run", 2))
    assert "ema" not in kinds
    assert all(kinds["exported"][name].equal(weight) for name, weight in kinds["weight"].items())


def test_the_moving_average_is_what_is_validated(recipe: Recipe, whole: Path, tmp_path: Path) -> None:
    from vlafit.train.validate import validate

    logged = {e["step"]: e["validation/loss"] for e in metrics(whole) if "validation/loss" in e}
    assert sorted(logged) == [0, 4, 8]
    exported = checkpoints.load_all(whole / "checkpoints" / "step_000008")
    assert exported.codecs is not None
    batches = dataloader.validation_batches(build(recipe, CPU), rank=0, world=1)
    again = validate(exported.policy, batches, recipe.train, CPU, exported.codecs)
    assert again["validation/loss"] == pytest.approx(logged[8], rel=1e-6)


def test_the_moving_average_follows_the_rule_and_steps_aside() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.0)
    ema = Ema(model, decay=0.5)
    for value, decay in ((1.0, 2 / 11), (3.0, 3 / 12)):  # (1 + n) / (10 + n) until that reaches the decay
        before = float(ema.average["weight"])
        with torch.no_grad():
            model.weight.fill_(value)
        ema.update()
        assert float(ema.average["weight"]) == pytest.approx(decay * before + (1 - decay) * value)
    average = ema.average["weight"].clone()
    with ema.applied():
        assert model.weight.equal(average)
    assert model.weight.item() == 3.0 and ema.average["weight"].equal(average)


def test_the_average_steps_in_without_a_second_copy_of_the_weights() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(6)))
    ema = Ema(model, decay=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    ema.update()
    live = [p.detach().clone() for p in model.parameters()]
    largest = max(p.numel() * p.element_size() for p in live)
    with LiveBytes([*model.parameters(), *ema.average.values()]) as held, ema.applied():
        assert 0 < held.peak <= largest
        assert not any(torch.equal(a, b) for a, b in zip(live, model.parameters(), strict=True))
    assert held.peak <= largest
    assert all(torch.equal(a, b) for a, b in zip(live, model.parameters(), strict=True))


def test_the_gradient_is_clipped(card: Path, tmp_path: Path) -> None:
    """AdamW hides the gradient's size, but for one that is far below its epsilon: then nothing moves."""
    moved = {}
    for limit in (0.0, 1e-14):
        recipe = tiny(card, optim={"clip_norm": limit, "ema": 0.0, "weight_decay": 0.0}, train={"steps": 1})
        begin = dict(build(recipe, CPU).policy.named_parameters())
        run(recipe, tmp_path / str(limit))
        after = split(learned(tmp_path / str(limit), 1))["weight"]
        moved[limit] = max(float((after[name] - begin[name].detach()).abs().max()) for name in after)
        (event,) = [e for e in metrics(tmp_path / str(limit)) if "train/grad_norm" in e]
        assert event["train/grad_norm"] > 1e-3  # logged as it was before clipping
    assert moved[1e-14] < 1e-4 * moved[0.0]


def test_the_learning_rate_warms_up_and_falls_as_a_cosine() -> None:
    recipe = OptimRecipe(warmup_steps=4, final_lr=0.1)
    shares = [schedule(step, 20, recipe) for step in range(20)]
    assert shares[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert shares[12] == pytest.approx(0.1 + 0.9 / 2)
    assert shares[4:] == sorted(shares[4:], reverse=True) and shares[-1] > 0.1
    assert schedule(20, 20, recipe) == pytest.approx(0.1)


def test_the_learning_rate_falls_in_one_step_as_pytorchs_multistep_or_stays() -> None:
    recipe = OptimRecipe(warmup_steps=0, schedule="step", schedule_steps=12, final_lr=0.1)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs, expected = torch.optim.lr_scheduler.MultiStepLR(optimizer, [12], 0.1), []
    for _ in range(20):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert [schedule(step, 20, recipe, spent=0.5) for step in range(20)] == pytest.approx(expected)
    assert schedule(0, 20, replace(recipe, warmup_steps=4)) == pytest.approx(0.2)
    for constant in (OptimRecipe(warmup_steps=0, final_lr=1.0), replace(recipe, final_lr=1.0)):
        assert {schedule(step, 20, constant) for step in range(20)} == {1.0}


# --------------------------------------------------------------------------------------- randomness, order


def test_validation_draws_are_the_same_at_every_step_and_for_every_seed(card: Path, tmp_path: Path) -> None:
    still = {"steps": 3, "validate_every": 1, "save_every": 0, "keep_best": False}
    run(tiny(card, train=still, optim={"lr": 1e-30, "ema": 0.0}), tmp_path / "run")
    values = [e["validation/loss"] for e in metrics(tmp_path / "run") if "validation/loss" in e]
    assert len(values) == 4 and len(set(values)) == 1


def test_held_out_episodes_are_never_trained_on(recipe: Recipe) -> None:
    data = build(recipe, CPU).data
    assert all(len(ids) == 6 for ids in data.training) and all(len(ids) == 2 for ids in data.validation)
    assert not set(data.training[0]) & set(data.validation[0])


def test_loader_processes_change_nothing(recipe: Recipe, whole: Path, tmp_path: Path) -> None:
    run(replace(recipe, data=replace(recipe.data, workers=2)), tmp_path / "run")
    assert_same(learned(tmp_path / "run", 8), learned(whole, 8))


def test_augmentation_and_bf16_run_on_the_cpu(card: Path, tmp_path: Path) -> None:
    recipe = tiny(card, train={"precision": "bf16", "steps": 3}, data={"shift_pixels": 2})
    run(recipe, tmp_path / "run")
    run(replace(recipe, train=replace(recipe.train, precision="fp32")), tmp_path / "fp32")
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "fp32"), rel=0.05)
    assert losses(tmp_path / "run") != losses(tmp_path / "fp32")
    dead = {info.name for info in build(recipe, torch.device("cpu")).policy.parts() if info.dead}
    saved = {name.split("/", 1)[1]: tensor for name, tensor in learned(tmp_path / "run", 3).items()}
    assert {name for name, tensor in saved.items() if tensor.dtype != torch.float32} <= dead


# ------------------------------------------------------------------------------------- checkpoints, numbers


def folders(out: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in (out / "checkpoints").glob("step_*"))


@pytest.mark.parametrize(("keep", "stay"), [pytest.param(0, [7], marks=pytest.mark.slow), (2, [5, 6, 7])])
def test_the_last_checkpoint_and_as_many_as_asked_stay(
    card: Path, tmp_path: Path, keep: int, stay: list[int]
) -> None:
    train = {"steps": 7, "save_every": 1, "keep": keep, "keep_best": False, "validate_every": 2}
    run(tiny(card, train=train), tmp_path / "run")
    assert folders(tmp_path / "run") == stay
    assert json.loads((tmp_path / "run" / "checkpoints" / "last.json").read_text())["step"] == 7
    assert not (tmp_path / "run" / "checkpoints" / "best.json").exists()


def test_the_best_checkpoint_stays_however_old_it_is(card: Path, tmp_path: Path) -> None:
    # The learning rate starts so small that it helps, and then ruins the policy.
    train = {"steps": 8, "save_every": 2, "keep": 0, "validate_every": 1}
    run(tiny(card, train=train, optim={"lr": 3.0, "warmup_steps": 40, "ema": 0.0}), tmp_path / "run")
    values = {e["step"]: e["validation/loss"] for e in metrics(tmp_path / "run") if "validation/loss" in e}
    best = min((s for s in values if s), key=lambda s: values[s])
    assert best < 8, values
    assert folders(tmp_path / "run") == [best, 8]
    pointer = json.loads((tmp_path / "run" / "checkpoints" / "best.json").read_text())
    assert pointer == {"step": best, "path": f"step_{best:06d}", "validation/loss": values[best]}


def test_numbers_that_are_not_finite_end_the_run_and_touch_no_checkpoint(card: Path, tmp_path: Path) -> None:
    recipe = tiny(
        card, train={"steps": 40, "save_every": 1, "keep": 50}, optim={"lr": 1e25, "warmup_steps": 0}
    )
    with pytest.raises(NotFinite, match=r"(?s)not finite.*(lower optim\.lr)") as caught:
        run(recipe, tmp_path / "run")
    for step in folders(tmp_path / "run"):
        assert all(t.isfinite().all() for t in learned(tmp_path / "run", step).values())
    if folders(tmp_path / "run"):
        assert f"step_{folders(tmp_path / 'run')[-1]:06d}" in str(caught.value)


def test_a_run_says_what_made_it(whole: Path) -> None:
    record = json.loads((whole / "run.json").read_text())
    assert record["finished"] is True and record["steps"] == 8 and record["processes"] == 1
    assert {"python", "torch", "accelerate", "numpy"} <= set(record["versions"])
    assert record["load_report"].splitlines() == [
        "all weights are fresh",
        "tokenizer: learned from the data's instructions",
    ]
    for name in ("recipe.toml", "plan.json", "report.html", "report.json"):
        assert (whole / name).is_file(), name
    assert all(math.isfinite(e["train/grad_norm"]) for e in metrics(whole) if "train/grad_norm" in e)


def test_trackers_of_accelerate_are_written_beside_the_metrics(card: Path, tmp_path: Path) -> None:
    run(tiny(card, train={"steps": 2, "trackers": ("tensorboard",)}), tmp_path / "run")
    assert list((tmp_path / "run" / "tensorboard").rglob("events.out.*"))


# -------------------------------------------------------------------------------------------- fine-tuning


def test_a_checkpoint_is_fine_tuned_with_its_own_codec(card: Path, whole: Path, tmp_path: Path) -> None:
    base = whole / "checkpoints" / "step_000008"
    policy = {"checkpoint": str(base), "family": "", "size": "", "config": {}}
    run(tiny(card, policy=policy, train={"steps": 1}, data={"episodes_per_task": 1}), tmp_path / "run")
    made = tmp_path / "run" / "checkpoints" / "step_000001"
    assert (made / "codec.json").read_bytes() == (base / "codec.json").read_bytes()
    assert (
        "native checkpoint of pi0" in json.loads((tmp_path / "run" / "run.json").read_text())["load_report"]
    )


def test_fresh_statistics_come_from_the_training_episodes(card: Path, whole: Path, tmp_path: Path) -> None:
    base = whole / "checkpoints" / "step_000008"
    policy = {"checkpoint": str(base), "family": "", "size": "", "config": {}}
    data = {"episodes_per_task": 1, "statistics": "data", "normalisation": "quantile"}
    codec = build(tiny(card, policy=policy, data=data), CPU).codec
    assert codec.config.normalisation == "quantile"
    like_before = build(tiny(card, policy=policy, data={"statistics": "data"}), CPU).codec
    assert like_before.config.normalisation == "mean_std"
    assert codec.statistics["action"].count < checkpoints.load(base).codec.statistics["action"].count  # type: ignore[union-attr]


def test_pi05_with_relative_actions_and_quantiles_goes_the_whole_way(card: Path, tmp_path: Path) -> None:
    shutil.copytree(card.parent, tmp_path / "data")
    other = tmp_path / "data" / card.name
    other.write_text(
        card.read_text()
        .replace("delta_position", "")
        .replace("[robot]\n", "[robot]\nrelative = [true, false]\n")
    )
    recipe = tiny(
        other,
        policy={"size": "pi05-tiny", "config": {"max_tokens": 80}},
        data={"normalisation": "quantile"},
        train={"steps": 2},
        eval={"protocol": str(card.parent / "toy.toml"), "after": True},
    )
    summary = run(recipe, tmp_path / "run")
    assert summary.finished and 0 <= summary.success["after"] <= 1
    codec = checkpoints.load(tmp_path / "run" / "checkpoints" / "step_000002").codec
    assert codec is not None
    assert (codec.config.prompt, codec.config.relative) == ("pi05", (True, False))
    assert codec.config.normalisation == "quantile"


def test_parts_can_start_afresh(card: Path, whole: Path) -> None:
    base = whole / "checkpoints" / "step_000008"
    policy = {"checkpoint": str(base), "family": "", "size": "", "config": {}, "fresh": ("expert",)}
    made, loaded = build(tiny(card, policy=policy), CPU).policy, checkpoints.load(base).policy
    for info in made.parts():
        same = made.get_parameter(info.name).equal(loaded.get_parameter(info.name))
        assert same == (info.part != "expert"), info.name


def test_samples_that_stay_the_same_are_read_once_and_encoded_alike(card: Path) -> None:
    data = open_data(tiny(card).data, seed=0)
    experiment = build(tiny(card), torch.device("cpu"))
    chunks = ChunkDataset(data.stores, experiment.codec.config.chunk, data.training)
    read: list[int] = []

    class Counting(ChunkDataset):
        def __getitem__(self, position: int) -> Sample:
            read.append(position)
            return super().__getitem__(position)

    counting = Counting(data.stores, experiment.codec.config.chunk, data.training)
    plain = EncodedSamples(chunks, experiment.codec, 0, 0)
    first = plain[0, 3][1]
    size = sum(value.nbytes for value in vars(first).values() if isinstance(value, np.ndarray))
    keeping = EncodedSamples(counting, experiment.codec, 0, 0, keep_bytes=2 * size)
    for _ in range(3):
        for position in (3, 4, 5):
            key, encoded = keeping[7, position]
            assert key == (7, position)
            for name, value in vars(plain[0, position][1]).items():
                np.testing.assert_array_equal(getattr(encoded, name), value)
    assert read == [3, 4, 5, 5, 5]  # two fit, and the third is read each time
    shifted = EncodedSamples(counting, experiment.codec, 2, 0, keep_bytes=10 * size)
    assert not np.array_equal(shifted[0, 3][1].images, shifted[1, 3][1].images)
