"""Recompute and 8-bit moments change memory and little else, and a forecast says how much before a run."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.train import test_interruptions
from tests.train.world import assert_same, learned, losses, tiny
from tests.variants import variants
from vlafit.errors import ConfigError
from vlafit.nn.recompute import recompute_blocks
from vlafit.nn.rng import sample_rng
from vlafit.policies import build_family, families, family
from vlafit.recipe import Recipe
from vlafit.train import piecewise_adamw, run
from vlafit.train.adam8bit import BLOCK, SIGNED, MomentsIn8Bits, States, state_bytes, table
from vlafit.train.data import open_data
from vlafit.train.fit import close, fit, workload_of
from vlafit.train.forecast import QUANTISED_BITS, Workload, forecast, full_batch
from vlafit.train.frozen import narrow_names
from vlafit.train.less_memory import BF16, Change, changes, require_fit
from vlafit.train.live_bytes import LiveBytes
from vlafit.train.memory_ladder import (
    Rung,
    first_that_fits,
    forecaster,
    gb,
    parse_memory,
    room_for,
    rungs,
    smallest,
)
from vlafit.train.piecewise_adamw import PiecewiseAdamW, workspace
from vlafit.train.preflight import meta_policy
from vlafit.tuning import enter, load_strategy, preview

SIZES = {
    "pi0": "pi0-small",
    "smolvla": "smolvla-tiny",
    "xvla": "xvla-tiny",
    "openvla": "openvla-oft-tiny",
    "pi0_fast": "pi0-fast-tiny",
    "act": "act-tiny",
}
TINY = {size: name for name in families() for size in family(name).SIZES if size.endswith("-tiny")}
OFTEN = ["pi0-tiny", "act-tiny", "xvla-tiny"]

# ---------------------------------------------------------------------------------------------- recompute


@pytest.mark.parametrize("how", variants(["selective", "full"], always=["selective"]))
def test_recompute_changes_no_byte(how: str, recipe: Recipe, whole: Path, tmp_path: Path) -> None:
    run(replace(recipe, train=replace(recipe.train, recompute=how)), tmp_path / "run")
    assert losses(tmp_path / "run") == losses(whole)
    assert_same(learned(tmp_path / "run", 8), learned(whole, 8))


@pytest.mark.parametrize("name", SIZES)
def test_recompute_repeats_dropout_and_gives_the_same_gradients(name: str) -> None:
    config = {"dropout": 0.2} if name == "act" else {}
    gradients = {}
    for how in ("none", "selective", "full"):
        policy = build_family(name, SIZES[name], config, torch.Generator().manual_seed(0))
        recompute_blocks(policy, how)
        policy.train()
        with torch.device("cpu"):
            batch = _filled(policy, 2)
        torch.manual_seed(5)
        sums = policy(batch, sample_rng([(0, 0), (0, 1)], seed=0))
        torch.stack(list(sums.values())).sum().backward()
        gradients[how] = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    assert gradients["none"]
    for how in ("selective", "full"):
        assert gradients[how].keys() == gradients["none"].keys()
        assert all(torch.equal(gradients[how][n], g) for n, g in gradients["none"].items())


def _filled(policy, rows: int):
    """A batch on the CPU, whose last camera is missing in the last row."""
    batch = full_batch(policy.needs(), rows, 2, 0)
    rng = torch.Generator().manual_seed(1)
    values = {}
    for name, value in batch.present().items():
        if value.dtype is torch.bool:
            values[name] = torch.ones(value.shape, dtype=torch.bool)
        elif value.is_floating_point():
            values[name] = torch.randn(value.shape, generator=rng)
        else:
            values[name] = torch.randint(0, 4, value.shape, generator=rng).to(value.dtype)
    values["image_mask"][-1, -1] = False
    return replace(batch, **values).to("cpu")


# ------------------------------------------------------------------------------------------ 8-bit moments


def _regression(optimizer_of, steps: int) -> tuple[list[float], torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    x, target = torch.randn(256, 64), torch.randn(256, 64)
    groups = [{"params": list(model.parameters()), "lr": 3e-3, "weight_decay": 0.01}]
    optimizer, curve = optimizer_of(groups), []
    for _ in range(steps):
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(float(loss))
    return curve, optimizer


def in_8_bits(groups: list[dict]) -> PiecewiseAdamW:
    """AdamW with moments in 8 bits."""
    named = [{**group, "names": [f"{n}" for n, _ in enumerate(group["params"])]} for group in groups]
    return PiecewiseAdamW(named, (0.9, 0.95), 1e-8, states="8bit")


def kept(groups: list[dict], states: States) -> PiecewiseAdamW:
    """AdamW with moments in fp32, beside the weights or on the host."""
    named = [{**group, "names": [f"{n}" for n, _ in enumerate(group["params"])]} for group in groups]
    return PiecewiseAdamW(named, (0.9, 0.95), 1e-8, states=states)


def test_moments_on_the_host_follow_fp32_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piecewise_adamw, "PIECE", 1024)  # so that a tensor has several
    curves, weights = [], []
    for states in ("fp32", "cpu"):
        curve, optimizer = _regression(lambda groups, states=states: kept(groups, states), 200)
        curves.append(curve)
        weights.append([p for group in optimizer.param_groups for p in group["params"]])
    assert curves[0] == curves[1] and curves[0][-1] < 0.05 * curves[0][0]
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))
    torchs, _ = _regression(lambda g: torch.optim.AdamW(g, betas=(0.9, 0.95), eps=1e-8), 200)
    assert curves[1] == pytest.approx(torchs, abs=1e-4 * torchs[0])


def test_moments_on_the_host_take_nothing_of_the_gpu_by_the_forecast() -> None:
    policy, workload = build_family("pi0", "pi0-tiny", {}, device="meta"), Workload(rows=2)
    beside, host = (
        forecast(policy, load_strategy("full"), replace(workload, states=states))
        for states in ("fp32", "cpu")
    )
    assert beside.optimiser > 0 and host.optimiser == 0
    assert host.update > 0  # the piece that is worked on
    assert (host.weights, host.gradients, host.activations) == (
        beside.weights, beside.gradients, beside.activations,
    )  # fmt: skip
    asked = Rung(states="cpu")
    ladder = rungs(workload, load_strategy("full"), fixed=asked, free=["recompute"])
    assert {rung.states for rung in ladder} == {"cpu"} and len(ladder) == 3
    assert "cpu" not in {rung.states for rung in rungs(workload, load_strategy("full"))}  # only by hand


def test_8_bit_moments_follow_the_loss_of_fp32_over_200_steps() -> None:
    wide, _ = _regression(lambda g: torch.optim.AdamW(g, betas=(0.9, 0.95), eps=1e-8), 200)
    narrow, optimizer = _regression(in_8_bits, 200)
    assert narrow == pytest.approx(wide, abs=0.002 * wide[0])  # the loss falls to 3 % of the first
    assert wide[-1] < 0.05 * wide[0]
    assert narrow != wide
    kinds = [sorted(state) for state in optimizer.state.values()]
    quantised = ["exp_avg.codes", "exp_avg.scale", "exp_avg_sq.codes", "exp_avg_sq.scale", "step"]
    assert kinds == [quantised, ["exp_avg", "exp_avg_sq", "step"]] * 2  # weights and biases


def test_codes_and_scales_are_those_of_torchao() -> None:
    subclass = pytest.importorskip("torchao.optim.subclass_8bit")
    utils = pytest.importorskip("torchao.optim.quant_utils")
    maps = {"exp_avg": subclass.get_qmap_signed(), "exp_avg_sq": subclass.get_qmap_unsigned()}
    rng, numbers = torch.Generator().manual_seed(0), 2**16
    for name, qmap in maps.items():
        assert table(SIGNED[name]) == tuple(qmap)
        codes = torch.randint(0, 256, (numbers,), generator=rng).to(torch.uint8)
        scale = torch.rand(numbers // BLOCK, generator=rng)
        value = torch.randn(numbers, generator=rng) if SIGNED[name] else torch.rand(numbers, generator=rng)
        state = {f"{name}.codes": codes.clone(), f"{name}.scale": scale.clone()}
        moment = MomentsIn8Bits().update(state, name, slice(0, numbers), value, 0.9)
        theirs = utils.dequant_with_qmap(codes, torch.tensor(qmap), scale).lerp_(value, 1 - 0.9)
        scaled, largest = utils.scale_tensor(theirs, BLOCK)
        assert torch.equal(moment, theirs) and torch.equal(state[f"{name}.scale"], largest)
        assert torch.equal(state[f"{name}.codes"], utils.quantize_8bit_with_qmap(scaled, torch.tensor(qmap)))


def test_small_tensors_train_as_with_torchs_adamw() -> None:
    parameters = [nn.Parameter(torch.linspace(-1, 1, 100)) for _ in range(2)]
    optimizers = [
        torch.optim.AdamW([{"params": [parameters[0]]}], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1),
        in_8_bits([{"params": [parameters[1]], "lr": 1e-2, "weight_decay": 0.1}]),
    ]
    for step in range(5):
        for parameter, optimizer in zip(parameters, optimizers, strict=True):
            parameter.grad = torch.sin(torch.arange(100.0) + step)
            optimizer.step()
    assert torch.allclose(parameters[0], parameters[1], rtol=1e-5, atol=1e-7)


def test_the_size_of_the_pieces_changes_no_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    curves = []
    for piece in (2**22, 256):
        monkeypatch.setattr(piecewise_adamw, "PIECE", piece)
        curves.append(_regression(in_8_bits, 5)[0])
    assert curves[0] == curves[1]


@pytest.mark.parametrize(("states", "kept_as"), [("8bit", "exp_avg.codes"), ("cpu", "exp_avg")])
def test_a_run_with_other_moments_goes_on_bit_for_bit(
    card: Path, tmp_path: Path, states: str, kept_as: str
) -> None:
    recipe = tiny(card, optim={"states": states}, train={"steps": 4, "save_every": 2, "validate_every": 0})
    config = {"max_tokens": 16, "vision.depth": 1, "language.depth": 2}
    config |= {"language.mlp": 256}  # so that there is a tensor of 4096 numbers
    recipe = replace(recipe, policy=replace(recipe.policy, config=config))
    run(recipe, tmp_path / "whole")
    with pytest.raises(test_interruptions.Interrupted):
        run(recipe, tmp_path / "pieces", callbacks=test_interruptions.Until(3, test_interruptions.crash))
    run(recipe, tmp_path / "pieces", resume=True)
    whole = learned(tmp_path / "whole", 4)
    assert any(name.startswith(f"adamw.{kept_as}/") for name in whole)
    assert_same(learned(tmp_path / "pieces", 4), whole)


# ----------------------------------------------------------------------------------------------- forecast


@pytest.mark.parametrize("size", variants(TINY, always=OFTEN))
@pytest.mark.parametrize("rows", [1, 4])
def test_a_step_on_the_meta_device_holds_what_a_step_on_the_cpu_does(size: str, rows: int) -> None:
    name, strategy = TINY[size], load_strategy("full")
    for how in ("none", "full"):
        bare = build_family(name, size, {}, device="meta")
        workload = Workload(
            rows, cameras=2, precision="fp32", frozen="fp32", recompute=how, on_cpu=True
        )  # fmt: skip
        made = forecast(bare, strategy, workload)
        policy = family(name).build(bare.config, "cpu")
        enter(policy, preview(policy, strategy))
        recompute_blocks(policy, how)
        policy.train()
        trained = [p for p in policy.parameters() if p.requires_grad]
        gradients = sum(p.numel() * 4 for p in trained)
        assert (made.gradients, made.optimiser, made.average) == (gradients, 2 * gradients, 0)
        live = LiveBytes([*policy.parameters(), *policy.buffers()])
        with live:
            sums = policy(_filled(policy, rows), sample_rng([(0, row) for row in range(rows)], seed=0))
            torch.stack(list(sums.values())).sum().backward()
        assert made.step == pytest.approx(live.peak, rel=0.1)


def test_dropout_of_attentions_weights_takes_them_on_a_cpu_and_not_on_a_gpu() -> None:
    policy, strategy = build_family("xvla", "xvla-tiny", {}, device="meta"), load_strategy("full")
    gpu = Workload(4, cameras=2, precision="fp32", frozen="fp32")
    on_gpu, on_cpu = (forecast(policy, strategy, one) for one in (gpu, replace(gpu, on_cpu=True)))
    assert on_cpu.activations > 1.2 * on_gpu.activations
    without = {"language.attention_dropout": 0.0, "expert.dropout": 0.0}
    policy = build_family("xvla", "xvla-tiny", without, device="meta")
    assert forecast(policy, strategy, gpu) == forecast(policy, strategy, replace(gpu, on_cpu=True))


def test_bf16_weights_recompute_and_8_bit_moments_lower_the_forecast() -> None:
    policy = build_family("pi0", "pi0-small", {"vision.depth": 1, "language.depth": 2}, device="meta")
    strategy = load_strategy("lora")
    wide = forecast(policy, strategy, Workload(4, precision="fp32", frozen="fp32"))
    narrow = forecast(policy, strategy, Workload(4))
    full = forecast(policy, strategy, Workload(4, recompute="full"))
    selective = forecast(policy, strategy, Workload(4, recompute="selective"))
    assert 0.5 * wide.weights < narrow.weights < 0.7 * wide.weights
    assert full.activations < selective.activations < narrow.activations < wide.activations
    assert full.total < selective.total < narrow.total < wide.total
    matrix = torch.empty(128, 384, device="meta")
    assert state_bytes(matrix, "8bit") < 0.26 * state_bytes(matrix, "fp32")


def test_bf16_weights_take_half_and_steps_in_the_backward_pass_keep_no_gradients() -> None:
    policy = build_family("pi0", "pi0-small", {"vision.depth": 1, "language.depth": 2}, device="meta")
    strategy, whole = load_strategy("full"), Workload(1, recompute="full")
    wide, narrow = (forecast(policy, strategy, replace(whole, trained=k)) for k in ("fp32", "bf16"))
    freed = forecast(policy, strategy, replace(whole, trained="bf16", in_backward=True))
    plan, bare = preview(policy, strategy), dict(policy.named_parameters())
    numbers = {n: bare[n].numel() for n in narrow_names(policy, plan, trained=True)}
    assert sum(numbers.values()) > 0.8 * sum(p.numel() for p in bare.values())
    in_bf16 = sum(numbers[name] for name in numbers if name in plan.trainable)
    assert wide.gradients - narrow.gradients == 2 * in_bf16
    assert narrow.optimiser == wide.optimiser and replace(narrow, average=0) == narrow
    largest = max(2 * numbers[n] if n in numbers else 4 * bare[n].numel() for n in plan.trainable)
    assert freed.gradients == largest and freed.weights == narrow.weights
    assert freed.step < narrow.step + max(workspace(p.numel()) for p in bare.values())
    averaged = forecast(policy, strategy, replace(whole, trained="bf16", ema=True))
    assert averaged.average == wide.gradients


def test_quantised_weights_are_whole_where_the_others_are_sharded() -> None:
    policy = build_family("pi0", "pi0-small", {"vision.depth": 1, "language.depth": 2}, device="meta")
    strategy, plain = load_strategy("qlora"), Workload(1)
    one = forecast(policy, strategy, plain)
    four = forecast(policy, strategy, replace(plain, shards=4, shards_weights=True))
    bare = dict(policy.named_parameters())
    rounded = preview(policy, strategy).quantised
    whole = sum(
        round(bare[f"{layer}.weight"].numel() * QUANTISED_BITS[how] / 8) for layer, how in rounded.items()
    )
    assert 0 < whole < one.weights
    assert four.weights == whole + (one.weights - whole) // 4
    assert (four.gradients, four.optimiser) == (one.gradients // 4, one.optimiser // 4)


def test_the_ladder_begins_with_the_fastest_and_ends_with_what_changes_how_a_run_learns() -> None:
    of_8, full = Workload(8), load_strategy("full")
    every = rungs(of_8, full)
    assert every[0] == Rung("none", "fp32", 1)
    assert [rung.changes for rung in every] == sorted(rung.changes for rung in every)
    alike = [rung for rung in every if rung.changes == 0]
    assert alike[-1] == Rung("full", "8bit", 8)
    assert every[-1] == Rung("full", "8bit", 1, "bf16", in_backward=True)
    assert every[-1].options.endswith("--train.weights bf16 --optim.in_backward true")
    assert "weights" not in alike[-1].options and "in_backward" not in alike[-1].options
    assert {rung.micro_batches for rung in every} == {1, 2, 4, 8}
    assert {rung.micro_batches for rung in every if rung.in_backward} == {1}
    held = rungs(of_8, full, fixed=Rung("none", "8bit", 2), free=["recompute"])
    assert [rung.recompute for rung in held] == ["none", "selective", "full"]
    assert {(rung.states, rung.micro_batches, rung.changes) for rung in held} == {("8bit", 2, 0)}
    assert {rung.recompute for rung in smallest(every)} == {"full"}
    assert smallest(rungs(of_8, full, fixed=Rung("none"))) == [Rung("none")]


def test_rungs_that_a_run_cannot_be_on_are_left_out() -> None:
    full, several = load_strategy("full"), replace(Workload(2), processes=2)
    assert max(rung.changes for rung in rungs(Workload(2), load_strategy("adalora"))) == 1
    assert max(rung.changes for rung in rungs(several, full)) == 1
    assert {rung.trained for rung in rungs(Workload(2, precision="fp32"), full)} == {"fp32"}
    sharded = rungs(replace(several, shards=2), full)
    assert {(rung.states, rung.changes) for rung in sharded} == {("fp32", 0)}


def test_what_does_not_fit_is_refused_with_the_rung_that_does() -> None:
    config = {"vision.depth": 1, "language.depth": 1}
    policy = build_family("pi0", "pi0-small", config, device="meta")
    of = forecaster(policy, load_strategy("full"), Workload(8))
    every = [Rung("none"), Rung("full"), Rung("full", "8bit", 8), Rung("full", "8bit", 8, "bf16")]
    need = [of(rung).total for rung in every]
    assert need == sorted(need, reverse=True)
    between = (need[1] * 1.06 + 800e6) / 1e9  # room for the second, not for the first
    assert first_that_fits(every, of, between) == every[1]
    assert first_that_fits(every, of, (need[3] * 1.06 + 800e6) / 1e9) == every[3]
    with pytest.raises(ConfigError) as raised:
        require_fit(every[0], of, [Change("", every, of)], between, "the GPU", on_cpu=False)
    for fact in ("--train.recompute full", "--optim.states fp32", "--train.memory ignore", "the GPU"):
        assert fact in str(raised.value)
    with pytest.raises(
        ConfigError, match=r"no setting lowers it below the room: the least, .* smaller policy"
    ):
        require_fit(every[0], of, [Change("", every, of)], 0.8, "the GPU", on_cpu=False)


def test_a_refusal_names_only_changes_that_fit_the_smallest_first() -> None:
    config = {"vision.depth": 1, "language.depth": 1}
    policy = build_family("pi0", "pi0-small", config, device="meta")
    full, expert = load_strategy("full"), load_strategy("expert")
    fp32 = Workload(1, precision="fp32", frozen="fp32", on_cpu=True)
    narrow = replace(fp32, precision="bf16", frozen="bf16")

    def refusal(strategy, room: int, workload: Workload = fp32) -> str:
        of = forecaster(policy, strategy, workload)
        with pytest.raises(ConfigError) as raised:
            every = changes(policy, strategy, workload, Rung())
            require_fit(Rung(), of, every, room * 1.0501e-9, "the free RAM", on_cpu=True)
        return str(raised.value)

    def lowest(strategy, workload: Workload) -> int:
        of = forecaster(policy, strategy, workload)
        return min(of(rung).total for rung in rungs(workload, strategy) if not rung.changes)

    said = refusal(expert, lowest(expert, fp32))  # of its rungs the last one fits
    assert said.index("this fits") < said.index("--optim.states 8bit") < said.index(BF16), said
    said = refusal(expert, lowest(expert, fp32) - 10**5)
    assert BF16 in said and "--strategy" not in said and "GPUs" not in said
    in_bf16 = forecaster(policy, expert, narrow)(Rung()).total
    assert f"with {gb(in_bf16)}: {BF16}" in refusal(expert, max(in_bf16, lowest(expert, fp32) - 10**5))
    said = refusal(expert, 10**6)
    assert "no setting lowers it" in said and "this fits" not in said and "--strategy expert" not in said
    said = refusal(full, lowest(load_strategy("lora"), narrow), narrow)
    assert "this fits" in said and "--strategy lora" in said and BF16 not in said


def test_a_cpu_has_no_driver_and_small_figures_are_in_mb() -> None:
    assert room_for(0.2, on_cpu=True) == int(0.2e9 / 1.05) and room_for(24) < room_for(24, on_cpu=True)
    assert (gb(10**8), gb(99 * 10**6), gb(10**5)) == ("0.1 GB", "99.0 MB", "0.1 MB")


@pytest.mark.slow
def test_a_run_picks_the_rung_that_fits_or_is_refused_before_it_loads(
    card: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = {"steps": 2, "save_every": 0, "validate_every": 0}
    with pytest.raises(ConfigError, match=r"train\.memory = '0\.00001GB'.*--train\.memory ignore"):
        run(tiny(card, train=short | {"memory": "0.00001GB"}), tmp_path / "small")
    assert not (tmp_path / "small" / "recipe.toml").exists()
    with caplog.at_level(logging.INFO):
        run(tiny(card, train=short | {"memory": "1GB", "recompute": "full"}), tmp_path / "run")
    assert any("train.memory = 1GB picks --train.recompute full" in text for text in caplog.messages)
    written = (tmp_path / "run" / "recipe.toml").read_text()
    for line in ('recompute = "full"', 'states = "fp32"', "accumulate = 1", 'precision = "fp32"',
                 'weights = "fp32"', "in_backward = false"):  # fmt: skip
        assert line in written


def test_a_memory_picks_bf16_weights_only_where_it_must_and_never_against_the_recipe(card: Path) -> None:
    config = {"vision.depth": 1, "language.depth": 1}
    train = {"precision": "bf16", "frozen": "bf16", "sharding": "none", "batch_size": 1}
    policy = {"size": "pi0-small", "config": config}
    recipe = tiny(card, policy=policy, train=train, optim={"in_backward": False})
    data = open_data(recipe.data, 0)
    policy = meta_policy(recipe, data)
    of = forecaster(policy, load_strategy("full"), workload_of(close(recipe), policy, data, 1))
    wide, narrow = (of(Rung("full", "8bit", trained=trained)).total for trained in ("fp32", "bf16"))
    assert narrow < wide
    for need, wanted in ((wide, "fp32"), (narrow, "bf16")):
        asked = replace(recipe, train=replace(recipe.train, memory=f"{need * 1.05e-9 + 0.801:.9f}GB"))
        made = fit(asked, policy, data, processes=1, gigabytes=None).recipe
        assert (made.train.weights, made.optim.in_backward) == (wanted, False)
    held = replace(asked, train=replace(asked.train, weights="fp32"))
    with pytest.raises(ConfigError, match=r"--optim\.states 8bit .*--train\.weights bf16"):
        fit(held, policy, data, processes=1, gigabytes=None)


def test_a_memory_is_a_number_of_gb() -> None:
    assert (parse_memory("24GB"), parse_memory("0.5 gb"), parse_memory("")) == (24.0, 0.5, None)
    for text in ("24", "GB", "0GB", "24GiB"):
        with pytest.raises(ConfigError, match=r"train\.memory .*24GB"):
            parse_memory(text)
