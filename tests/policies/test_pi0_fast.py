"""pi0-FAST against what LeRobot and openpi recorded (tests/fixtures/lerobot_pi0_fast), and its contract."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import vlafit
from vlafit import checkpoints, shipped
from vlafit.checkpoints.formats.lerobot import names
from vlafit.errors import CodecError, ConfigError, StrategyError
from vlafit.nn.batch import Batch
from vlafit.nn.policy import ParameterInfo, mean_loss
from vlafit.nn.random_batch import random_batch
from vlafit.nn.rng import sample_rng
from vlafit.policies import pi0_fast
from vlafit.policies.pi0 import LanguageConfig, VisionConfig
from vlafit.train.batch_shape import BatchShape
from vlafit.train.flops import FlopCounter
from vlafit.train.forecast import Workload, forecast
from vlafit.train.live_bytes import LiveBytes
from vlafit.tuning import load_strategy, preview

RECORDED = Path(__file__).parent.parent / "fixtures" / "lerobot_pi0_fast"
META = json.loads((RECORDED / "meta.json").read_text())
CONFIG = pi0_fast.Pi0FastConfig(
    VisionConfig(width=48, depth=2, mlp=96, heads=4, patch=14, image_size=28),
    LanguageConfig(width=64, depth=3, mlp=128, heads=8, kv_heads=1, head_dim=16, vocab=512),
    chunk=10, state_dim=7, action_dim=6, max_tokens=64, action_tokens=48, rules="lerobot",
)  # fmt: skip
TINY = pi0_fast.SIZES["pi0-fast-tiny"]
HEAD = "model.paligemma_with_expert.paligemma.lm_head.weight"


def renamed(name: str) -> str:
    if name == HEAD:
        return "lm_head.weight"
    return next(ours + name[len(theirs) :] for ours, theirs in names.PI0.prefixes if name.startswith(theirs))


def loaded(folder: str = "", **changes: object) -> pi0_fast.Pi0Fast:
    theirs = load_file(RECORDED / folder / "model.safetensors")
    policy = pi0_fast.build(replace(CONFIG, **changes), "cpu")  # type: ignore[arg-type]
    weights = {renamed(name): tensor for name, tensor in theirs.items()}
    if policy.config.tied:
        del weights["lm_head.weight"]
    policy.load_state_dict(weights)
    return policy


def recorded() -> tuple[Batch, dict[str, Tensor]]:
    io = load_file(RECORDED / "io.safetensors")
    cameras = ("cam_high", "cam_wrist")
    batch = Batch(
        images=torch.stack([io[f"core.image.{name}"] for name in cameras], 1),
        image_mask=torch.stack([io[f"core.image_mask.{name}"] for name in cameras], 1),
        state=io["batch.observation.state"],
        tokens=io["batch.observation.language.tokens"],
        token_mask=io["batch.observation.language.attention_mask"],
        target_tokens=io["batch.action.tokens"],
        target_mask=io["batch.action.token_mask"],
    )
    return batch, io


def loss_of(policy: pi0_fast.Pi0Fast, batch: Batch) -> Tensor:
    (total,), (count,) = policy.loss(batch, rng()).values(), policy.counts(batch, 1).values()
    return total / count


def rng(rows: int = 2):
    return sample_rng([(0, row) for row in range(rows)], seed=0)


def openpi(order: str) -> tuple[Batch, dict[str, Tensor]]:
    """The batch in openpi's layout: one sequence, split where the loss begins."""
    batch, _ = recorded()
    io = load_file(RECORDED / "openpi_jax.safetensors")
    tokens, real = io[f"{order}.tokens"].long(), io[f"{order}.token_mask"].bool()
    causal = io[f"{order}.ar_mask"].bool() & real
    rows = [(t[~c & r], t[c]) for t, c, r in zip(tokens, causal, real, strict=True)]
    prompts, parts = ([row[i] for row in rows] for i in (0, 1))

    def padded(values: list[Tensor]) -> tuple[Tensor, Tensor]:
        joined = torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
        lengths = torch.tensor([len(value) for value in values])
        return joined, torch.arange(joined.shape[1]) < lengths[:, None]

    batch.tokens, batch.token_mask = padded(prompts)
    batch.target_tokens, batch.target_mask = padded(parts)
    return batch, {name.partition(".")[2]: v for name, v in io.items() if name.startswith(order)}


def test_loss_and_logits_are_those_that_lerobot_recorded():
    policy = loaded(tied=False)
    batch, io = recorded()
    logits = policy.logits(batch)
    torch.testing.assert_close(logits[:, :4], io["out.logits_actions_first4"], rtol=1e-4, atol=1e-4)
    real = batch.target_mask[:, :-1]
    sums = io["out.logsumexp_actions"][:, : real.shape[1]]
    torch.testing.assert_close(logits.logsumexp(-1)[real], sums[real], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss_of(policy, batch), io["out.loss"], rtol=1e-5, atol=1e-5)


def test_every_layer_on_the_way_gives_what_lerobot_recorded():
    policy, (batch, io) = loaded(tied=False, rules="openpi"), recorded()  # which reads the prompt's end, too
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    policy.language.register_forward_hook(lambda _, args, out: seen.append((*args[:2], out[0])))
    policy.logits(batch)
    (given, places, prompt), (_, places_of_actions, actions) = seen
    patches = policy.vision(batch.images.flatten(0, 1)).unflatten(0, (2, 2))
    near = {"rtol": 1e-4, "atol": 1e-4}
    for camera in range(2):
        torch.testing.assert_close(patches[:, camera], io[f"out.vision.{camera}"], **near)
        projected = policy.projector(patches[:, camera])
        torch.testing.assert_close(projected, io[f"out.projector.{camera}"], **near)
        theirs = load_file(RECORDED / "openpi_jax.safetensors")
        if camera == 0:
            torch.testing.assert_close(projected, theirs["projector.0"], **near)
    torch.testing.assert_close(given[:, 8:], io["out.lang_embeddings"], **near)
    valid = torch.cat((torch.ones(2, 8, dtype=torch.bool), batch.token_mask), 1)
    assert batch.target_mask is not None
    real = torch.cat((valid, batch.target_mask), 1)
    assert torch.equal(real, io["out.prefix_pad_masks"])
    ours = torch.cat((places, places_of_actions), 1)  # the last action token predicts nothing
    assert torch.equal(ours[real[:, :-1]], io["out.position_ids"][:, :-1][real[:, :-1]])
    last = batch.token_mask[:, -8:]
    torch.testing.assert_close(prompt[:, -8:][last], io["out.hidden_last_prompt"][last], **near)
    counted = batch.target_mask[:, :-1]
    torch.testing.assert_close(actions[counted], io["out.hidden_actions"][:, :-1][counted], **near)


def test_who_sees_whom_is_as_recorded():
    """What a token changes shows in the gradients of its input."""
    policy, (batch, io) = loaded(tied=False), recorded()
    allowed = io["out.attention_mask_2d"]
    given: list[Tensor] = []

    def watched(_: object, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        given.append(args[0].detach().requires_grad_())
        return (given[-1], *args[1:])

    policy.language.register_forward_pre_hook(watched)
    logits = policy.logits(batch)
    for query in (0, 5, 20):
        sources = torch.autograd.grad(logits[:, query].square().sum(), given, retain_graph=True)
        moved = torch.cat([source.abs().sum(-1) > 0 for source in sources], 1)  # [b, prefix + actions - 1]
        assert torch.equal(moved, allowed[:, 72 + query, :-1])


@pytest.mark.parametrize("folder", ["", "overfit"])
def test_losses_of_tokens_and_samples_are_those_that_lerobot_recorded(folder: str):
    policy, (batch, io) = loaded(folder, tied=False), recorded()
    logits = policy.logits(batch)
    if folder:
        torch.testing.assert_close(loss_of(policy, batch), io["overfit.loss"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits[:, :4], io["overfit.logits_actions_first4"], rtol=1e-4, atol=1e-4)
        cached, full = (io[f"overfit.greedy_tokens_{how}"].tolist() for how in ("kv", "nocache"))
        for one, other in zip(cached, full, strict=True):  # LeRobot ends a row at "|" with the cache alone
            end = one.index(META["ids"]["bar_plain"]) + 1
            assert one[:end] == other[:end]
        return
    assert batch.target_tokens is not None and batch.target_mask is not None
    each = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), batch.target_tokens[:, 1:], reduction="none"
    )
    mask = batch.target_mask[:, 1:]
    assert torch.equal(mask, io["out.loss_mask"].bool())
    torch.testing.assert_close(each[mask], io["out.loss_per_token"][mask], rtol=1e-4, atol=1e-4)
    samples = torch.where(mask, each, 0.0).sum(1) / mask.sum(1)
    torch.testing.assert_close(samples, io["out.loss_per_sample"], rtol=1e-4, atol=1e-4)
    assert torch.equal(io["out.greedy_tokens_nocache"], io["out.greedy_tokens_kv"])
    assert io["out.loss_recomputed"].item() == pytest.approx(META["loss"], rel=1e-6)


def test_padding_in_the_middle_changes_nothing_when_it_is_cut():
    batch, io = recorded()
    torch.testing.assert_close(
        loss_of(loaded(tied=False), batch.trim()), io["out.loss"], rtol=1e-5, atol=1e-5
    )


def test_a_missing_camera_gives_the_recorded_loss():
    batch, io = recorded()
    batch.image_mask[:, 1] = False
    loss = loss_of(loaded(tied=False), batch)
    torch.testing.assert_close(loss, io["missing_wrist.loss"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rules", ["openpi", "lerobot"])
def test_the_accuracy_counts_the_tokens_of_the_loss_but_for_the_end(rules: str):
    policy = loaded(tied=False)
    policy.config = replace(policy.config, rules=rules)
    batch, _ = recorded()
    likeliest = policy.logits(batch).argmax(-1)
    assert batch.target_tokens is not None and batch.target_mask is not None
    begin = batch.target_tokens.shape[1] - likeliest.shape[1]
    right = every = 0
    for row, (tokens, mask) in enumerate(
        zip(batch.target_tokens.tolist(), batch.target_mask.tolist(), strict=True)
    ):
        for place, (token, real) in enumerate(zip(tokens[begin:], mask[begin:], strict=True)):
            if real and token != policy.config.eos:
                every += 1
                right += int(likeliest[row, place]) == token
    ((hits, count),) = policy.measures(batch)
    assert (int(hits), count) == (right, every) and every > 0


@pytest.mark.parametrize("rules", ["openpi", "lerobot"])
def test_a_camera_that_all_rows_lack_is_trimmed_only_where_it_is_not_seen(rules: str):
    policy = loaded(tied=False)
    policy.config = replace(policy.config, rules=rules)
    batch, _ = recorded()
    batch.image_mask[:, 1] = False
    trimmed = batch.trim(sees_missing=policy.needs().sees_missing)
    assert trimmed.image_mask.shape[1] == batch.image_mask.shape[1] - (rules == "lerobot")
    torch.testing.assert_close(loss_of(policy, trimmed), loss_of(policy, batch), rtol=1e-5, atol=1e-5)
    without = replace(batch, images=batch.images[:, :1], image_mask=batch.image_mask[:, :1])
    assert (loss_of(policy, without) - loss_of(policy, batch)).abs() > 1e-4 or rules == "lerobot"


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_and_three_steps_of_adamw_are_the_recorded_ones(tied: bool):
    policy = loaded(tied=tied)
    batch, io = recorded()
    settings = META["adamw"]
    optimizer = torch.optim.AdamW(
        policy.parameters(), settings["lr"], settings["betas"], settings["eps"], settings["weight_decay"]
    )
    curve = settings["curve_tied" if tied else "curve_lerobot_untied"]
    for step, (wanted, norm) in enumerate(curve):
        loss = loss_of(policy, batch)
        assert loss.item() == pytest.approx(wanted, rel=1e-4), step
        if norm is None:
            break
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            check_gradients(policy, io, tied)
        total = torch.nn.utils.clip_grad_norm_(policy.parameters(), settings["clip"])
        assert total.item() == pytest.approx(norm, rel=1e-4), step
        optimizer.step()


def check_gradients(policy: pi0_fast.Pi0Fast, io: dict[str, Tensor], tied: bool) -> None:
    gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    norms = dict(META["grad_norms"])
    if tied:
        embedding = next(name for name in norms if "embed_tokens" in name)
        norms[embedding] = META["grad_norms_if_tied"][HEAD]
        del norms[HEAD]
    assert {renamed(name) for name in norms} == set(gradients) == {info.name for info in policy.parts()}
    for name, norm in norms.items():
        got = gradients[renamed(name)].norm().item()
        assert got == pytest.approx(norm, rel=1e-4, abs=1e-6), name  # of key biases it is 0 but for rounding
    recorded = {
        renamed(key.removeprefix("grad.")): value for key, value in io.items() if key.startswith("grad.")
    }
    if tied:
        recorded["language.embed_tokens.weight"] += recorded.pop("lm_head.weight")
    for name, gradient in recorded.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_greedy_decoding_gives_the_recorded_tokens():
    batch, io = recorded()
    tokens = loaded(tied=False).act(batch, rng())
    assert torch.equal(tokens[:, :16], io["out.greedy_tokens_kv"])
    overfit = loaded("overfit", tied=False).act(batch, rng())
    bar = META["ids"]["bar_plain"]
    for row, wanted in zip(overfit.tolist(), io["overfit.greedy_tokens_kv"].tolist(), strict=True):
        end = wanted.index(bar) + 1
        assert row[:end] == wanted[:end] and row[end] == META["ids"]["eos"] and not any(row[end + 1 :])


def test_decoding_with_a_cache_is_the_full_pass_repeated():
    batch, _ = recorded()
    for rules in ("openpi", "lerobot"):
        policy = loaded(rules=rules)
        tokens = policy.act(batch, rng())
        given = torch.full((2, 1), 2) if rules == "lerobot" else tokens[:, :0]
        batch.target_tokens = torch.cat((given, tokens), 1)
        batch.target_mask = torch.ones_like(batch.target_tokens, dtype=torch.bool)
        best = policy.logits(batch).argmax(-1)
        for row in range(2):
            end = (tokens[row] == 1).nonzero()[0, 0] + 1 if (tokens[row] == 1).any() else tokens.shape[1]
            assert torch.equal(best[row, :end], tokens[row, :end]), rules


@pytest.mark.parametrize("order", ["lerobot_order", "openpi_order"])
def test_losses_of_samples_and_decoded_tokens_are_those_that_openpi_recorded(order: str):
    batch, io = openpi(order)
    policy = loaded(rules="openpi" if order == "openpi_order" else "lerobot")
    for row in range(2):
        one = Batch(**{name: value[row : row + 1] for name, value in batch.present().items()})
        assert loss_of(policy, one).item() == pytest.approx(io["loss_per_sample"][row].item(), abs=1e-4)
    if order == "openpi_order":
        assert loss_of(policy, batch).item() == pytest.approx(io["loss_per_sample"].mean().item(), abs=1e-4)
    else:
        tokens = policy.act(batch, rng())[:, :16]
        assert torch.equal(tokens, io["greedy_tokens_without_position_gap"])


def test_the_loss_over_micro_batches_is_that_of_the_whole_batch():
    batch, _ = recorded()
    for rules in ("openpi", "lerobot"):
        policy = loaded(rules=rules)
        parts = [
            Batch(**{name: value[row : row + 1] for name, value in batch.present().items()}) for row in (0, 1)
        ]
        sums = [policy.loss(part, rng(1))["token"].item() for part in parts]
        counts = [policy.counts(part, 1)["token"] for part in parts]
        whole = mean_loss(policy.terms(), {"token": sum(sums)}, {"token": sum(counts)})
        # Cross-entropies are sums over 512 logits; two layouts of the same batch differ by their rounding.
        assert whole == pytest.approx(loss_of(policy, batch).item(), rel=1e-5)


def test_tokens_are_drawn_where_there_is_a_temperature():
    policy = pi0_fast.build(replace(TINY, temperature=1.0), "cpu")
    batch = random_batch(policy.needs(), 2)
    first, again = (policy.act(batch, rng()) for _ in range(2))
    other = policy.act(batch, sample_rng([(1, 0), (1, 1)], seed=0))
    assert torch.equal(first, again) and not torch.equal(first, other)
    cold = pi0_fast.build(replace(TINY, temperature=1e-6), "cpu")
    greedy = pi0_fast.build(TINY, "cpu")
    assert torch.equal(cold.act(batch, rng()), greedy.act(batch, rng()))


def test_every_parameter_learns_and_no_strategy_sees_dead_ones():
    policy = pi0_fast.build(TINY, "cpu")
    policy.loss(random_batch(policy.needs(), 2), rng())["token"].backward()
    assert not [info.name for info in policy.parts() if info.dead]
    assert all(p.grad is not None and p.grad.any() for p in policy.parameters() if p.ndim > 1)


def test_a_batch_without_action_tokens_and_sizes_that_do_not_fit_are_refused():
    policy = pi0_fast.build(TINY, "cpu")
    batch = random_batch(policy.needs(), 2)
    batch.target_tokens = None
    with pytest.raises(CodecError, match="action tokens"):
        policy.loss(batch, rng())
    for change, words in (
        ({"eos": 700}, "eos 700 .*at most 699"),
        ({"temperature": -1.0}, "temperature is -1"),
    ):
        with pytest.raises(ConfigError, match=words):
            replace(TINY, **change)


@pytest.mark.parametrize("size", pi0_fast.SIZES)
def test_a_shipped_strategy_trains_something_or_names_the_part_that_pi0_fast_lacks(size: str):
    with torch.device("meta"):
        policy = pi0_fast.build(pi0_fast.SIZES[size])
    fitting = set()
    for name in shipped.names("strategy"):
        try:
            plan = preview(policy, load_strategy(name))
        except StrategyError as error:
            assert re.search(r"'(expert|projections)'|no prefix", str(error)), error
        else:
            fitting.add(name)
            assert plan.trainable and not any(e.trainable and e.dead for e in plan.entries)
    assert {"full", "lora-all", "frozen-vision"} <= fitting


def test_an_output_layer_of_its_own_belongs_to_the_language_model_as_in_every_family():
    policy = pi0_fast.build(replace(TINY, tied=False), "meta")
    (head,) = [info for info in policy.parts() if info.name.startswith("lm_head.")]
    assert (head.part, head.kind, head.dead) == ("language", "linear", False)
    for name in ("lora", "attention", "openpi-lora"):  # as with a head that is tied to the embedding
        assert "lm_head.weight" not in preview(policy, load_strategy(name)).trainable
    with pytest.raises(StrategyError, match="no part 'projections'"):
        preview(policy, load_strategy("projections"))
    slow = preview(policy, load_strategy("slow-backbone"))
    assert {entry.lr for entry in slow.entries} == {0.1}


def test_a_run_that_called_the_output_layer_a_projection_is_opened_as_it_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    policy, parts = pi0_fast.build(replace(TINY, tied=False), "cpu"), pi0_fast.Pi0Fast.parts

    def before(policy: pi0_fast.Pi0Fast) -> list[ParameterInfo]:
        return [replace(i, part="projections") if "lm_head" in i.name else i for i in parts(policy)]

    with monkeypatch.context() as older:
        older.setattr(pi0_fast.Pi0Fast, "parts", before)
        plan = vlafit.apply_strategy(policy, "lora")
        assert "lm_head.weight" in plan.trainable
        checkpoints.save(policy, tmp_path / "run", plan=plan)
    again = checkpoints.load(tmp_path / "run")
    assert again.plan == plan and torch.equal(again.policy.lm_head.weight, policy.lm_head.weight)
    assert {n for n, p in again.policy.named_parameters() if p.requires_grad} == set(plan.trainable)


def test_states_are_normalised_to_the_range_whose_bins_the_prompt_writes():
    assert {pi0_fast.build(size, "meta").needs().normalisation for size in pi0_fast.SIZES.values()} == {
        "quantile"
    }


def test_memory_and_arithmetic_of_a_step_are_those_that_were_forecast():
    policy, strategy = pi0_fast.build(TINY, "cpu"), load_strategy("full")
    policy.train()
    batch = random_batch(policy.needs(), 4)
    made = forecast(
        pi0_fast.build(TINY, "meta"),
        strategy,
        Workload(4, cameras=2, tokens=16, precision="fp32", frozen="fp32"),
    )
    longest = torch.zeros(4, TINY.action_tokens, dtype=torch.int64)  # which is what a forecast takes
    full = replace(batch, target_tokens=longest, target_mask=torch.ones_like(longest, dtype=torch.bool))
    live = LiveBytes([*policy.parameters(), *policy.buffers()])
    with live:
        policy.loss(full, rng(4))["token"].backward()
    assert made.step == pytest.approx(live.peak, rel=0.1)
    count = FlopCounter(pi0_fast.build(TINY, "meta"), preview(policy, strategy), draws=1)
    for one in (full, batch):
        with FlopCounterMode(display=False) as counter:
            policy.loss(one, rng(4))["token"].backward()
        # torch does not count attention on a CPU: two products forward, five backward.
        queries, prefix = one.target_tokens.shape[1] - 1, 2 * 4 + 16
        heads = TINY.language.heads * TINY.language.head_dim
        pairs = TINY.language.depth * heads * (prefix**2 + queries * (prefix + queries))
        pairs += TINY.vision.depth * TINY.vision.width * 2 * 4**2  # two images of four patches
        assert count(BatchShape.of(one)) == counter.get_total_flops() + 4 * 7 * 2 * pairs
    assert count(BatchShape.of(batch)) < count(BatchShape.of(full))
