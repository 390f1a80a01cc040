"""OpenVLA's tokens, OFT's parallel tokens and its diffusion head against its authors' numbers."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.policies.test_openvla import CLOSE, CONFIG, FIXTURE, KEYS, normalisers, recorded, stored
from vlafit.checkpoints.formats.openvla import names
from vlafit.codec import CodecConfig
from vlafit.codec.action_bins import ActionBinConfig, ActionBins
from vlafit.errors import CodecError, ConfigError
from vlafit.nn import ddim
from vlafit.nn.batch import Batch
from vlafit.nn.policy import Policy
from vlafit.nn.random_batch import random_batch
from vlafit.nn.rng import sample_rng
from vlafit.policies import openvla
from vlafit.policies._openvla_config import NO_EXPERT
from vlafit.train import action_tokenizer
from vlafit.train.batch_shape import BatchShape
from vlafit.train.flops import FlopCounter
from vlafit.tuning import load_strategy, preview

TOKENS = replace(CONFIG, expert=NO_EXPERT, chunk=1, proprio=False, head="tokens", text_vocab=512)
HEADS = {
    "tokens": TOKENS,
    "parallel_tokens": replace(TOKENS, head="parallel_tokens", chunk=8),
    "diffusion": replace(CONFIG, head="diffusion"),
}
BINS = ActionBins(ActionBinConfig(end=512, longest=57, eos=2), 7)
TINY = openvla.SIZES["openvla-tiny"]


def loaded(head: str) -> openvla.OpenVLA:
    """The policy with the recorded weights of this head."""
    policy = openvla.build(HEADS[head], "cpu")
    tensors = {n: t for n, t in stored().items() if not n.startswith("action_head.")}
    if head == "diffusion":
        for module, prefix in (("action_head_diffusion", "action_head."), ("noisy_action_projector",) * 2):
            prefix = prefix.rstrip(".") + "."
            tensors |= {prefix + n: t for n, t in load_file(FIXTURE / f"{module}.safetensors").items()}
    weights = names.read(tensors).weights
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            parameter.copy_(weights[name])
    return policy


@pytest.fixture(scope="module")
def io() -> dict[str, Tensor]:
    return load_file(FIXTURE / "io.safetensors") | load_file(FIXTURE / "diffusion.safetensors")


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    return load_file(FIXTURE / "openvla_plain.safetensors")


def with_targets(batch: Batch, labels: Tensor) -> Batch:
    """The batch with the tokens that `labels` [b, l] count, which end every row."""
    rows = [row[row != -100] for row in labels]
    targets = torch.stack(rows)
    return replace(batch, target_tokens=targets, target_mask=torch.ones_like(targets, dtype=torch.bool))


def one_image(io: dict[str, Tensor], plain: dict[str, Tensor]) -> Batch:
    batch = recorded(io)
    return with_targets(
        replace(batch, images=batch.images[:, :1], image_mask=batch.image_mask[:, :1], actions=None),
        plain["in.labels"],
    )


def loss_of(policy: Policy, batch: Batch) -> Tensor:
    sums, counts = policy.loss(batch, sample_rng(KEYS[: len(batch)], seed=0)), policy.counts(batch, 1)
    return sums["token"] / counts["token"]


def assert_gradients(policy: openvla.OpenVLA, recorded_norms: dict[str, float | None]) -> None:
    """Every gradient's norm is the recorded one, and exactly the dead parameters have none."""
    norms = {
        n.removeprefix("vla.").replace("action_head_diffusion.", "action_head."): v
        for n, v in recorded_norms.items()
    }
    name_of = names.OF_DIFFUSION if policy.noise_proj is not None else names.NAMES
    gradients = {name_of.file_name(n): p.grad for n, p in policy.named_parameters()}
    dead = {name_of.file_name(i.name) for i in policy.parts() if i.dead}
    assert set(gradients) == set(norms) and {n for n, v in norms.items() if v is None} == dead
    for name, gradient in gradients.items():
        norm = norms[name]
        if norm is None:
            assert gradient is None, name
        else:
            assert gradient is not None
            assert float(gradient.norm()) == pytest.approx(norm, rel=1e-4), name


# ------------------------------------------------------------------------------------------------- OpenVLA


def test_openvlas_loss_gradients_logits_and_the_curve_of_adamw_are_the_recorded_ones(io, plain):
    policy, batch = loaded("tokens"), one_image(io, plain)
    facts = json.loads((FIXTURE / "openvla_plain.json").read_text())
    with torch.no_grad():
        torch.testing.assert_close(policy.images(batch, None), plain["out.projector"], **CLOSE)
        torch.testing.assert_close(policy.logits(batch), plain["out.logits_actions"], **CLOSE)
    loss = loss_of(policy, batch)
    assert loss.item() == pytest.approx(facts["loss"], rel=1e-6)
    assert loss.item() == pytest.approx(plain["out.loss"].item(), rel=1e-6)
    loss.backward()
    assert_gradients(policy, facts["grad_norms"])
    adamw = facts["adamw"]
    live = [p for i, p in zip(policy.parts(), policy.parameters(), strict=True) if not i.dead]
    optimizer = torch.optim.AdamW(live, lr=adamw["lr"], weight_decay=adamw["weight_decay"])
    for step, expected in enumerate(adamw["curve"]):
        loss = loss_of(policy, batch)
        assert loss.item() == pytest.approx(expected, rel=1e-4), step
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_each_tokens_loss_is_the_recorded_one(io, plain):
    policy, batch = loaded("tokens"), one_image(io, plain)
    assert batch.target_tokens is not None and batch.target_mask is not None
    for row in range(2):
        expected = plain["out.loss_per_token"][row][plain["in.labels"][row, 1:] != -100]
        for place in range(8):
            batch.target_mask[:] = False
            batch.target_mask[row, place] = True
            assert policy.counts(batch, 1) == {"token": 1.0}
            assert loss_of(policy, batch).item() == pytest.approx(expected[place].item(), abs=1e-4)


def test_openvla_decodes_the_recorded_tokens_and_actions_in_a_batch_and_alone(io, plain):
    policy, batch = loaded("tokens"), one_image(io, plain)
    _, normaliser = normalisers()
    bins = ActionBins(ActionBinConfig(end=512, longest=8, eos=2), 7)
    together = policy.act(batch, sample_rng(KEYS[:2], seed=0))
    for row in range(2):
        expected = plain[f"predict.tokens.{row}"]
        one = replace(batch, **{name: value[row : row + 1] for name, value in batch.present().items()})
        alone = policy.act(one.trim(1), sample_rng(KEYS[:1], seed=0))
        assert together[row].tolist() == alone[0].tolist() == expected.tolist()
        answer = bins.decode(together[row].numpy(), 1)
        assert not answer.valid  # random weights answer with words, too
        decoded = normaliser.decode(answer.chunk)[0]
        np.testing.assert_allclose(decoded, plain[f"predict.actions.{row}"].numpy(), rtol=0, atol=1e-6)


def test_decoding_with_a_cache_gives_the_likeliest_tokens_of_whole_passes(io, plain):
    policy, batch = loaded("tokens"), one_image(io, plain)
    answers = policy.act(batch, sample_rng(KEYS[:2], seed=0))
    whole = replace(batch, target_tokens=answers, target_mask=torch.ones_like(answers, dtype=torch.bool))
    with torch.no_grad():
        assert torch.equal(policy.logits(whole).argmax(-1), answers)
    probed = policy.probe(batch, sample_rng(KEYS[:2], seed=0))
    torch.testing.assert_close(probed[:, 0], policy.logits(whole)[:, 0].detach())


def test_a_row_that_has_ended_stays_ended_and_gives_zeros(io, plain):
    policy, batch = loaded("tokens"), one_image(io, plain)
    whole = policy.act(batch, sample_rng(KEYS[:2], seed=0))
    ended = openvla.build(replace(TOKENS, eos=int(whole[0, 2])), "cpu")
    ended.load_state_dict(policy.state_dict())
    answer = ended.act(batch, sample_rng(KEYS[:2], seed=0))
    assert answer[0].tolist() == [*whole[0, :3].tolist(), 0, 0, 0, 0]
    assert answer[1].tolist() == whole[1].tolist()
    bins = ActionBins(ActionBinConfig(end=512, longest=8, eos=int(whole[0, 2])), 7)
    read = bins.decode(answer[0].numpy(), 1)
    assert not read.valid and not read.chunk[0, 2:].any()


# ------------------------------------------------------------------------------------------ parallel tokens


def test_parallel_decoding_gives_the_recorded_loss_logits_tokens_and_actions(io):
    policy = loaded("parallel_tokens")
    batch = with_targets(recorded(io), io["in.labels"])
    facts = json.loads((FIXTURE / "meta.json").read_text())
    with torch.no_grad():
        logits = policy.logits(batch)
        torch.testing.assert_close(logits[:, :3], io["discrete.logits_first3"], **CLOSE)
    loss = loss_of(policy, batch)
    assert loss.item() == pytest.approx(io["discrete.loss"].item(), rel=1e-6)
    loss.backward()
    assert_gradients(policy, facts["grad_norms_discrete"])
    tokens = policy.act(batch, sample_rng(KEYS[:2], seed=0))
    assert torch.equal(tokens, io["discrete.argmax_tokens"])
    _, normaliser = normalisers()
    for row in range(2):
        answer = BINS.decode(tokens[row].numpy(), 8).chunk
        np.testing.assert_allclose(answer, io["discrete.decoded_normalised"][row].numpy(), rtol=0, atol=1e-9)
        one = replace(batch, **{n: v[row : row + 1] for n, v in batch.present().items()}).trim(1)
        alone = policy.act(one, sample_rng(KEYS[:1], seed=0))
        decoded = normaliser.decode(BINS.decode(alone[0].numpy(), 8).chunk)
        np.testing.assert_allclose(decoded, io[f"predict.discrete.{row}"].numpy(), rtol=0, atol=1e-6)


def test_each_token_of_parallel_decoding_has_the_recorded_loss(io):
    policy = loaded("parallel_tokens")
    batch = with_targets(recorded(io), io["in.labels"])
    assert batch.target_tokens is not None
    with torch.no_grad():
        error = torch.nn.functional.cross_entropy(
            policy.logits(batch).transpose(1, 2), batch.target_tokens, reduction="none"
        )
    for row in range(2):
        expected = io["discrete.loss_per_token"][row][io["in.labels"][row, 1:] != -100]
        torch.testing.assert_close(error[row], expected, **CLOSE)


# ---------------------------------------------------------------------------------------------------- bins


def test_values_become_the_recorded_tokens_and_these_the_recorded_values(io):
    values, tokens = io["bins.values"].numpy(), io["bins.tokens"].numpy()
    # The recorded tokens are those of the whole vocabulary of Llama, or of the tiny one.
    end = 32_000 if tokens.max() > 600 else 512
    bins = ActionBins(ActionBinConfig(end, 2, 2), 1)
    assert np.array_equal(bins.encode(values), tokens)
    np.testing.assert_allclose(bins.values(tokens), io["bins.decoded"].numpy(), rtol=0, atol=1e-12)
    normal = io["in.actions"].numpy()
    for row in range(2):
        labels = io["in.labels"][row]
        made, mask = BINS.padded(normal[row], np.ones((8, 7), np.bool_))
        assert made.tolist() == labels[labels != -100].tolist() and mask.all()
        read = BINS.decode(made, 8)
        # A bin is 2 / 255 wide, and the value is anywhere in it.
        assert read.valid and np.abs(read.chunk - normal[row].clip(-1, 1)).max() <= 1 / 255 + 1e-9


def test_an_answer_with_a_word_too_few_tokens_or_an_early_end_is_not_valid():
    bins = ActionBins(ActionBinConfig(end=512, longest=5, eos=2), 2)
    good = bins.encode(np.array([-1.0, 0.0, 0.5, 1.0]))
    assert bins.decode(good, 2).valid
    word = good.copy()
    word[1] = 17
    assert not bins.decode(word, 2).valid and bins.decode(word, 2).chunk[0, 1] == pytest.approx(254 / 255)
    assert not bins.decode(good[:3], 2).valid
    early = np.array([good[0], 2, 0, 0])
    answer = bins.decode(early, 2)
    assert not answer.valid and answer.chunk.ravel()[1:].tolist() == [0, 0, 0]


@pytest.mark.parametrize("head", ["tokens", "parallel_tokens"])
def test_what_is_sent_for_an_answer_that_is_no_chunk_is_said_as_it_is(head: str):
    """OpenVLA's answers may end early; of those in one pass OFT's code reads every token by itself."""
    wanted = action_tokenizer.bins(openvla.build(replace(TINY, head=head, chunk=2)).needs())
    assert wanted is not None and wanted.ends == (head == "tokens")
    bins = ActionBins(wanted, 2)
    tokens = bins.encode(np.array([-1.0, 0.5, 0.5, 1.0]))
    tokens[1] = wanted.eos
    answer = bins.decode(tokens, 2)
    rest = [0, 0, 0] if wanted.ends else [254 / 255, bins.values(tokens[2:3])[0], bins.values(tokens[3:])[0]]
    assert not answer.valid and answer.chunk.ravel()[1:].tolist() == pytest.approx(rest)
    config = CodecConfig(
        cameras=("front",), image_size=28, state_dim=2, action_dim=2, chunk=2,
        normalisation="openvla_quantile", action_bins=wanted,
    )  # fmt: skip
    assert "an end of the range" in config.fate_of_invalid
    assert ("ended early" in config.fate_of_invalid) == wanted.ends


def test_steps_past_the_end_of_an_episode_and_dimensions_that_the_robot_lacks_do_not_count():
    bins = ActionBins(ActionBinConfig(end=512, longest=9, eos=2), 2)
    counted = np.array([[True, True], [False, False]])
    tokens, mask = bins.padded(np.zeros((2, 2)), counted)
    assert mask.tolist() == [True, True, False, False, True, False, False, False, False]
    assert tokens[4] == 2 and (tokens[:4] == bins.encode(np.zeros(4))).all()


# ----------------------------------------------------------------------------------------------- diffusion


def test_the_diffusion_head_predicts_the_recorded_noise_with_the_recorded_gradients(io):
    policy, batch = loaded("diffusion"), recorded(io)
    facts = json.loads((FIXTURE / "meta.json").read_text())
    steps, noise = io["in.diffusion_timesteps"], io["in.diffusion_noise"]
    assert batch.actions is not None
    torch.testing.assert_close(ddim.alphas(), io["diffusion.alphas_cumprod"], rtol=1e-6, atol=0)
    noisy = ddim.noised(batch.actions, noise, steps)
    torch.testing.assert_close(noisy, io["diffusion.noisy_actions"], rtol=0, atol=1e-6)
    embedded = ddim.embedded(steps, CONFIG.language.width)
    torch.testing.assert_close(embedded, io["diffusion.timestep_embedding"][:, 0], rtol=0, atol=1e-5)
    predicted = policy.noise(batch, noisy, steps)
    torch.testing.assert_close(predicted, io["diffusion.noise_pred"], **CLOSE)
    loss = (predicted - noise).square().mean()
    assert loss.item() == pytest.approx(io["diffusion.loss"].item(), rel=1e-6)
    loss.backward()
    assert_gradients(policy, facts["grad_norms_diffusion"])


def test_ddim_in_50_and_10_steps_gives_the_recorded_actions(io):
    policy, batch = loaded("diffusion"), recorded(io)
    _, normaliser = normalisers()
    for row in range(2):
        one = replace(batch, **{n: v[row : row + 1] for n, v in batch.present().items()}).trim(1)
        noise = io[f"predict.diffusion_noise.{row}"]

        def answer(noise: Tensor, count: int, one: Batch = one) -> np.ndarray:
            with torch.no_grad():
                made = ddim.sample(lambda x, step: policy.noise(one, x, step), noise, count)
            return normaliser.decode(made[0].double().numpy())

        expected = io[f"predict.diffusion10.{row}"].numpy()
        np.testing.assert_allclose(answer(noise, 10), expected, rtol=0, atol=1e-4)
        # 50 steps begin where a thousandth of the action is left, and make rounding of the noise larger:
        # two answers agree as far as those to noise that differs by eight of float32's roundings.
        expected, ours = io[f"predict.diffusion50.{row}"].numpy(), answer(noise, 50)
        rounding = np.abs(answer(noise * (1 + 8 * torch.finfo(torch.float32).eps), 50) - ours).max()
        assert np.abs(ours - expected).max() <= 2 * rounding < 0.05


def test_the_diffusion_loss_is_that_of_its_draws_and_more_steps_than_trained_are_refused(io):
    policy, batch = loaded("diffusion"), recorded(io)
    assert batch.actions is not None and policy.steps == 50
    drawn = sample_rng(KEYS[:2], seed=3, draws=2)
    steps = (drawn.uniform(2) * 50).long()
    noise = drawn.normal(2, 8, 7)
    with torch.no_grad():
        expected = sum(
            (
                policy.noise(batch, ddim.noised(batch.actions, noise[:, k], steps[:, k]), steps[:, k])
                - noise[:, k]
            )
            .square()
            .sum()
            for k in range(2)
        )
        got = policy.loss(batch, sample_rng(KEYS[:2], seed=3, draws=2))["error"]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    policy.steps = 51
    with pytest.raises(ConfigError, match="51 sampling steps"):
        policy.act(batch, sample_rng(KEYS[:2], seed=0))


# ------------------------------------------------------------------------------------------------ promises


@pytest.fixture(scope="module", params=["tokens", "parallel_tokens", "diffusion"])
def tiny(request: pytest.FixtureRequest) -> openvla.OpenVLA:
    changes = {"head": request.param}
    base = openvla.SIZES["openvla-oft-tiny"] if request.param == "diffusion" else TINY
    return openvla.build(replace(base, **changes), "cpu")


def test_what_is_padding_or_missing_changes_no_answer(tiny):
    batch = random_batch(tiny.needs(), 3)
    batch.image_mask[0, 0] = False
    batch.token_mask = torch.arange(batch.prompt()[0].shape[1])[None] < torch.tensor([[4], [7], [9]])
    if tiny.config.head == "diffusion":
        tiny.steps = 2
    whole = tiny.probe(batch, sample_rng(KEYS, seed=0))
    spoiled = replace(batch, images=batch.images.clone(), tokens=batch.prompt()[0].clone())
    spoiled.images[0, 0] = float("nan")
    spoiled.prompt()[0][~batch.prompt()[1]] = 7
    torch.testing.assert_close(tiny.probe(spoiled, sample_rng(KEYS, seed=0)), whole, rtol=1e-5, atol=1e-5)
    for row in range(3):
        one = replace(batch, **{n: v[row : row + 1] for n, v in batch.present().items()}).trim(1)
        answer = tiny.probe(one, sample_rng(KEYS[row : row + 1], seed=0))
        torch.testing.assert_close(answer, whole[row : row + 1], rtol=1e-5, atol=1e-5)


def test_the_accuracy_counts_action_tokens_that_are_the_likeliest(io, plain):
    policy, batch = loaded("tokens"), one_image(io, plain)
    assert batch.target_mask is not None
    with torch.no_grad():
        likeliest = policy.logits(batch).argmax(-1)
    assert batch.target_tokens is not None
    batch.target_tokens = torch.cat((likeliest[:, :1], batch.target_tokens[:, 1:]), 1)
    with torch.no_grad():
        right = (policy.logits(batch).argmax(-1) == batch.target_tokens)[:, :7]
    batch.target_mask[0, 6] = False
    right[0, 6] = False
    ((hits, count),) = policy.measures(batch)
    assert (int(hits), count) == (int(right.sum()), 13.0) and hits >= 2
    assert policy.measured() == ("token_accuracy",)


def test_every_parameter_that_is_not_dead_learns_and_the_tokens_of_a_step_are_counted(tiny):
    batch = random_batch(tiny.needs(), 2)
    sums = tiny.loss(batch, sample_rng(KEYS[:2], seed=0))
    torch.stack(list(sums.values())).sum().backward()
    for info in tiny.parts():
        gradient = tiny.get_parameter(info.name).grad
        assert (gradient is None) == info.dead, info.name
    c = tiny.config
    rest = c.chunk * c.action_dim + 1 + int(c.proprio) + int(c.head == "diffusion")
    assert tiny.tokens(batch, 1) == 2 * (2 * 4 + batch.prompt()[0].shape[1] + rest)
    count = FlopCounter(tiny, preview(tiny, load_strategy("full")), draws=1)
    assert count(BatchShape(2, 2, 12)) == 2 * count(BatchShape(1, 2, 12)) > 0


def test_every_shipped_strategy_means_what_it_says_without_an_action_head():
    policy = openvla.build(TINY, "meta")
    parts = {i.part for i in policy.parts()}
    assert parts == {"vision", "projector", "language"}
    plan = preview(policy, load_strategy("openvla-oft"))
    assert plan.adapter_parameters > 0 and not any(e.trainable and not e.adapts for e in plan.entries)
    adapted = {e.adapts for e in plan.entries if e.adapts}
    assert "lm_head.weight" in adapted and "vision.dino.patch_embedding.weight" in adapted
    for name in ("full", "lora-all", "frozen-vision"):
        assert preview(policy, load_strategy(name)).trainable_parameters > 0


def test_the_public_openvla_has_the_parameters_of_its_published_file():
    policy = openvla.build(openvla.SIZES["openvla"], "meta")
    # openvla/openvla-7b: model.safetensors.index.json says 15,082,474,368 bytes, two for each parameter
    assert sum(p.numel() for p in policy.parameters()) == 7_541_237_184


def test_settings_that_do_not_go_together_are_named():
    for change, word in (
        ({"expert": openvla.ExpertConfig(8)}, "expert.width"),
        ({"text_vocab": 256}, "text_vocab"),
        ({"text_vocab": TINY.language.vocab + 1}, "language.vocab"),
        ({"head": "l1"}, "expert.width"),
    ):
        with pytest.raises(ConfigError, match=word):
            replace(TINY, **change)
    policy = openvla.build(TINY, "cpu")
    batch = replace(random_batch(policy.needs(), 1), target_tokens=None)
    with pytest.raises(CodecError, match="target_tokens"):
        policy.loss(batch, sample_rng(KEYS[:1], seed=0))
