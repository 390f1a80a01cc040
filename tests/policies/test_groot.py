"""GR00T N1.7 against what LeRobot recorded, and what its padding, embodiments and draws promise."""

import copy
import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vlafit import checkpoints
from vlafit.checkpoints.formats.groot import names
from vlafit.checkpoints.formats.lerobot import write_groot as lerobot
from vlafit.codec import Codec
from vlafit.errors import CodecError, ConfigError
from vlafit.nn.batch import Batch, stack
from vlafit.nn.policy import required_actions
from vlafit.nn.random_batch import random_batch
from vlafit.nn.rng import sample_rng
from vlafit.policies import groot, override
from vlafit.policies._common import select
from vlafit.policies.groot import SIZES, Groot
from vlafit.tuning import apply, load_strategy
from vlafit.types import Observation, Sample

FIXTURE = Path(__file__).parents[1] / "fixtures" / "lerobot_groot"
TOKENIZER = FIXTURE / "char_tokenizer"
IO = load_file(FIXTURE / "io.safetensors")
RECORDED = json.loads((FIXTURE / "numbers.json").read_text())
NUMBERS = RECORDED["numbers"]
BOUND = 1e-4  # the recording's; the numbers differ by 3e-5 at most
TINY = SIZES["groot-tiny"]


@functools.cache
def recorded() -> tuple[Groot, Codec]:
    """The recorded policy, without dropout, and its codec."""
    loaded = checkpoints.load(FIXTURE, tokenizer=TOKENIZER)
    assert isinstance(loaded.policy, Groot) and loaded.codec is not None
    loaded.policy.eval()
    return loaded.policy, loaded.codec


def images() -> Tensor:
    """The recorded patches, put together to images [b, n, 3, h, w]."""
    patches = IO["core.pixel_values"].view(4, 2, 2, 2, 2, 3, 2, 8, 8)
    assert torch.equal(patches[:, :, :, :, :, :, 0], patches[:, :, :, :, :, :, 1])
    return patches[:, :, :, :, :, :, 0].permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(2, 2, 3, 32, 32)


def recorded_batch() -> Batch:
    """What LeRobot's processors made: the words between the images and the end, padded on the right here."""
    texts = [
        ids[mask.bool()][18:-2]
        for ids, mask in zip(IO["core.input_ids"], IO["core.attention_mask"], strict=True)
    ]
    tokens = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    return Batch(
        images=images(),
        image_mask=torch.ones(2, 2, dtype=torch.bool),
        state=IO["core.state"][:, 0],
        tokens=tokens,
        token_mask=torch.arange(tokens.shape[1]) < torch.tensor([[len(text)] for text in texts]),
        actions=IO["core.action"],
        action_mask=IO["core.action_mask"].bool(),
    )


def of_rows(batch: Batch, rows: list[int]) -> Batch:
    return replace(batch, **{name: value[rows] for name, value in batch.present().items()})


TIME = 1 - IO["out.time"]  # LeRobot's runs the other way


def test_velocity_loss_and_features_are_those_that_lerobot_recorded():
    policy, batch = recorded()[0], recorded_batch()
    velocity = policy.velocity(batch, IO["raw.noise"], TIME)
    torch.testing.assert_close(-velocity, IO["out.pred_velocity"], rtol=0.0, atol=BOUND)
    loss = policy.flow_loss(batch, IO["raw.noise"], TIME)["loss"]
    torch.testing.assert_close(loss, IO["out.loss"], rtol=0.0, atol=BOUND)
    valid = IO["core.attention_mask"].bool()
    x, real, _ = policy._features(batch, fixed=True)
    torch.testing.assert_close(x[real], IO["out.backbone_features"][valid], rtol=0.0, atol=BOUND)
    memory = policy.encode_prefix(batch).memory
    torch.testing.assert_close(memory[real], IO["out.vl_self_attention"][valid], rtol=0.0, atol=BOUND)
    positions = policy.turn.positions(batch.image_mask, batch.prompt()[1])
    assert torch.equal(positions[real], IO["out.position_ids_thw"].permute(1, 2, 0)[valid])


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_samples_are_those_that_lerobot_recorded(steps: int):
    actions = recorded()[0].sample(recorded_batch(), IO["raw.noise"], steps)
    torch.testing.assert_close(actions, IO[f"out.sample_actions.n{steps}"], rtol=0.0, atol=BOUND)
    if steps == recorded()[0].steps:
        torch.testing.assert_close(actions[..., :6], IO["out.predict_action_chunk"], rtol=0.0, atol=BOUND)


def test_without_attended_padding_each_sample_gets_the_result_that_it_has_alone():
    policy, batch, noise = recorded()[0], recorded_batch(), IO["raw.noise"]
    alone = policy.sample(of_rows(batch, [1]), noise[1:], 4)
    torch.testing.assert_close(alone, IO["solo1.sample_actions.n4"], rtol=0.0, atol=BOUND)
    loss = policy.flow_loss(of_rows(batch, [1]), noise[1:], TIME[1:])["loss"]
    torch.testing.assert_close(loss, IO["solo1.loss"], rtol=0.0, atol=BOUND)
    assert (policy.sample(batch, noise, 4)[1:] - alone).abs().max() > 1  # as LeRobot has it
    policy = copy.copy(policy)
    policy.config = replace(policy.config, attend_padding=False)
    torch.testing.assert_close(
        policy.sample(batch, noise, 4)[1:], IO["solo1.sample_actions.n4"], rtol=0.0, atol=BOUND
    )


@pytest.mark.parametrize(("strategy", "kind"), [("full", "_all"), ("expert", "")])
def test_gradients_and_the_losses_of_adamw_are_those_that_lerobot_recorded(strategy: str, kind: str):
    policy, batch = copy.deepcopy(recorded()[0]), recorded_batch()
    apply(policy, load_strategy(strategy))
    policy.eval()
    settings = RECORDED["optimizer_of_curve"]
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        trained, lr=settings["lr"], betas=settings["betas"], eps=settings["eps"],
        weight_decay=settings["weight_decay"],
    )  # fmt: skip
    file_name = names.read(load_file(FIXTURE / "model.safetensors"), lerobot.NAMES).file_name
    for step in range(4):
        loss = policy.flow_loss(batch, IO["raw.noise"], TIME)["loss"]
        assert loss.item() == pytest.approx(NUMBERS[f"curve{kind}.{step}"], abs=BOUND)
        optimiser.zero_grad()
        loss.backward()
        if step == 0:
            _require_recorded_norms(policy, file_name, f"gradnorm{kind}.")
        optimiser.step()


def _require_recorded_norms(policy: Groot, file_name: Callable[[str], str], begin: str) -> None:
    """Compare the norm of every gradient; tables have those of the rows that are used."""
    squares: dict[str, float] = {}
    for name, parameter in policy.named_parameters():
        if parameter.grad is not None:
            there = file_name(name).replace("lm_head", "model.language_model.embed_tokens")
            squares[there] = squares.get(there, 0.0) + float(parameter.grad.double().square().sum())
    recorded = {name.removeprefix(begin): norm for name, norm in NUMBERS.items() if name.startswith(begin)}
    with_gradient = {name: norm for name, norm in recorded.items() if norm}
    assert set(squares) == set(with_gradient)
    for name, norm in with_gradient.items():  # a key's bias changes nothing: its gradient is rounding
        assert squares[name] ** 0.5 == pytest.approx(norm, rel=1e-4, abs=2e-6), name


def test_the_codec_makes_and_undoes_what_lerobots_processors_did():
    codec, batch = recorded()[1], recorded_batch()
    samples = [_sample(row, task) for row, task in enumerate(RECORDED["tasks"])]
    made = stack([codec.encode(sample) for sample in samples])
    torch.testing.assert_close(made.to("cpu").images, batch.images, rtol=0, atol=1e-6)
    torch.testing.assert_close(made.state, batch.state, rtol=0, atol=1e-6)
    mask = made.present()["action_mask"]
    assert torch.equal(mask, batch.present()["action_mask"])
    # The policy sets what is masked to 0, as LeRobot's processor does.
    shown = torch.where(mask, required_actions(made), 0.0)
    torch.testing.assert_close(shown, batch.actions, rtol=0, atol=1e-6)
    (tokens, seen), (recorded_tokens, recorded_seen) = made.prompt(), batch.prompt()
    length = recorded_seen.shape[1]
    assert torch.equal(seen[:, :length], recorded_seen) and not seen[:, length:].any()
    assert torch.equal(tokens[seen], recorded_tokens[recorded_seen])
    for row, sample in enumerate(samples):
        chunk = np.pad(IO["in.policy_action"][row].numpy(), ((0, 0), (0, 6)))
        decoded = codec.decode(chunk, sample.observation).actions
        np.testing.assert_allclose(decoded, IO["post.action"][row], rtol=0, atol=1e-6)


def _sample(row: int, task: str) -> Sample:
    frames = {
        name: IO[f"raw.observation.images.{name}"][row].permute(1, 2, 0).numpy()
        for name in ("front", "wrist")
    }
    observation = Observation(frames, IO["raw.observation.state"][row].numpy(), task)
    return Sample(
        observation, IO["raw.action"][row].numpy(), ~IO["raw.action_is_pad"][row].numpy(), ("a", "b", 0)
    )


def tiny(**changes: object) -> Groot:
    return groot.build(override(TINY, changes, "test"), "cpu")


def random_draws(rows: int, draws: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(draws, rows, TINY.chunk, TINY.action_dim, generator=generator)
    return noise, torch.rand(draws, rows, generator=generator) * 0.98 + 0.01


def tiny_batch(rows: int = 3) -> Batch:
    """Row 0 lacks the last camera and has the shortest instruction."""
    batch = random_batch(tiny().needs(), rows)
    batch.image_mask[0, 1] = False
    mask = batch.prompt()[1]
    mask[0, 7:] = mask[1, 9:] = False
    return batch


def test_draws_share_a_prefix_and_do_not_see_each_other():
    policy, batch = tiny(), tiny_batch()
    noise, time = random_draws(3, draws=4)
    together = policy.velocity(batch, noise, time)
    for draw in range(4):
        torch.testing.assert_close(together[draw], policy.velocity(batch, noise[draw], time[draw]))


def test_missing_cameras_and_padding_are_as_if_they_were_not_there():
    policy, batch = tiny(), tiny_batch()
    noise, time = random_draws(3, draws=1)
    every = policy.velocity(batch, noise[0], time[0])
    tokens, mask = batch.prompt()
    alone = replace(
        batch,
        images=batch.images[:1, :1],
        image_mask=batch.image_mask[:1, :1],
        tokens=tokens[:1, :7],
        token_mask=mask[:1, :7],
        state=batch.state[:1],
        actions=required_actions(batch)[:1],
        action_mask=None,
    )
    torch.testing.assert_close(policy.velocity(alone, noise[0, :1], time[0, :1]), every[:1])
    spoiled = replace(batch, tokens=torch.where(mask, tokens, 17))
    spoiled.images[0, 1] = torch.nan
    assert torch.equal(policy.velocity(spoiled, noise[0], time[0]), every)
    torch.testing.assert_close(policy.velocity(batch.trim(), noise[0], time[0]), every)


def test_a_sample_without_any_image_has_finite_actions_and_gradients():
    policy, batch = tiny(), tiny_batch()
    batch.image_mask[0] = False
    policy.loss(batch, sample_rng([(0, i) for i in range(3)], seed=0))["error"].backward()
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_each_embodiment_has_weights_of_its_own_and_the_others_feed_nothing():
    policy, batch = tiny(embodiment_rows=[2, 0]), tiny_batch()
    noise, time = random_draws(3, draws=1)
    first = policy.velocity(batch, noise[0], time[0])
    mixed = replace(batch, embodiment_id=torch.tensor([0, 1, 0]))
    both = policy.velocity(mixed, noise[0], time[0])
    assert torch.equal(both[[0, 2]], first[[0, 2]]) and not torch.allclose(both[1], first[1])
    other = tiny(embodiment_rows=[0])
    torch.testing.assert_close(other.velocity(batch, noise[0], time[0])[1], both[1])
    parts = {info.name: info for info in policy.parts()}
    unused = [name for name, info in parts.items() if info.part == "embodiments"]
    assert unused and all(".layers.1." in name and parts[name].dead for name in unused)
    assert parts["action_decoder.second.layers.2.weight"].part == "projections"
    with pytest.raises(CodecError, match=r"embodiment_id reaches from 0 to 1.*embodiment_rows.*\[1\]"):
        tiny().velocity(mixed, noise[0], time[0])


def test_rows_of_a_new_embodiment_start_fresh_by_name():
    policy = tiny()
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    drawn = groot.init_weights(policy, torch.Generator().manual_seed(7), ["*coder.*.layers.1.*"])
    assert drawn == [i.name for i in select(policy.parts(), ["projections"]) if ".layers.1." in i.name]
    changed = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in drawn if name.endswith(".weight")}  # fresh biases are zero again


def test_the_default_of_the_family_is_the_shipped_strategy_expert():
    policy = tiny()
    plan = apply(policy, load_strategy("expert"))
    head = {i.name for i in policy.parts() if i.part in ("expert", "projections")}
    assert set(plan.trainable) == head
    assert any(name.startswith("memory_norm") for name in head)


def test_the_state_is_dropped_in_training_only():
    policy, batch = tiny(state_dropout=0.5), tiny_batch()
    noise, time = random_draws(3, draws=1)
    other = replace(batch, state=batch.state + 1)
    policy.eval()
    one, two = (policy.velocity(each, noise[0], time[0]) for each in (batch, other))
    assert not torch.allclose(one, two)
    policy.train()
    rows = set()
    for seed in range(8):
        torch.manual_seed(seed)
        dropped = policy.velocity(batch, noise[0], time[0])
        torch.manual_seed(seed)
        rows |= {
            bool(equal) for equal in (policy.velocity(other, noise[0], time[0]) == dropped).flatten(1).all(1)
        }
    assert rows == {True, False}


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"image_size": 10}, "image_size 10"),
        ({"vision.deepstack": [2]}, r"deepstack.*2"),
        ({"vision.deepstack": [0, 1]}, "language.depth 2"),
        ({"language.sections": [1, 1, 1]}, "language.head_dim is 8; language.sections .*at most 6"),
        ({"embodiment_rows": [3]}, r"embodiment_rows \[3\] must be different rows from 0 to 2"),
        ({"embodiment_rows": [1, 1]}, "embodiment_rows"),
        ({"chunk": 7}, "chunk is 7; at most 6"),
        ({"chat.image_end": 300}, "chat.image_end is 300; at most 299"),
        ({"expert.dropout": 1.0}, "expert.dropout is 1.0"),
        ({"expert.memory_heads": 5}, "memory_heads 5"),
    ],
)
def test_sizes_that_do_not_go_together_are_named(changes: dict[str, object], facts: str):
    with pytest.raises(ConfigError, match=facts):
        override(TINY, changes, "test")


INSIDE = {  # recorded name -> our module
    "vision_patch_embed": "vision.patch_embedding",
    "vision_last_block": "vision.layers.3",
    "vision_merged": "projector",
    "deepstack0": "deepstack.layers.0",
    "deepstack1": "deepstack.layers.1",
    "state_features": "state_encoder",
    "action_encoder": "action_encoder",
    "time_embedding": "time_encoder",
    **{f"dit_block{number}": f"expert.layers.{number}" for number in range(6)},
    "dit_out": "expert",
}
OF_TOKENS = {"token_embeds": "language.embed_tokens", "lm_layer0_before_deepstack": "language.layers.0",
             "vlln": "memory_norm"}  # fmt: skip


def test_what_every_layer_computes_is_what_lerobot_recorded():
    policy, batch = recorded()[0], recorded_batch()
    found: dict[str, Tensor] = {}
    names_ = {*INSIDE.values(), *OF_TOKENS.values()}
    hooks = [
        policy.get_submodule(name).register_forward_hook(
            lambda module, inputs, out, name=name: found.setdefault(
                name, (out[0] if isinstance(out, tuple) else out).detach()
            )
        )
        for name in names_
    ]
    velocity = policy.velocity(batch, IO["raw.noise"], TIME)
    for hook in hooks:
        hook.remove()
    inside = load_file(FIXTURE / "intermediate.safetensors") | {"out.dit_out": IO["out.dit_out"]}
    for theirs, ours in INSIDE.items():
        wanted = inside[f"out.{theirs}"]
        torch.testing.assert_close(
            found[ours].reshape(wanted.shape), wanted, rtol=0.0, atol=BOUND, msg=theirs
        )
    valid = IO["core.attention_mask"].bool()
    tokens, mask = batch.prompt()
    text = ~policy.turn.is_image(tokens, 2)
    real = policy.turn.mask(batch.image_mask, mask)
    for theirs, ours in OF_TOKENS.items():
        mine, wanted = found[ours][real], inside[f"out.{theirs}"][valid]
        if theirs == "token_embeds":  # the words; images take the others' places after it
            words = text.expand(len(real), -1)[real]
            mine, wanted = mine[words], wanted[words]
        torch.testing.assert_close(mine, wanted, rtol=0.0, atol=BOUND, msg=theirs)
    x_t = (1 - IO["out.time"])[:, None, None] * IO["raw.noise"] + IO["out.time"][:, None, None] * IO[
        "core.action"
    ]
    torch.testing.assert_close(x_t, IO["out.x_t"], rtol=0.0, atol=1e-6)
    torch.testing.assert_close(IO["core.action"] - IO["raw.noise"], IO["out.u"], rtol=0.0, atol=1e-6)
    losses = (-velocity - IO["out.u"]) ** 2 * IO["core.action_mask"]
    torch.testing.assert_close(losses, inside["out.losses_unreduced"], rtol=1e-5, atol=BOUND)
    assert torch.equal((IO["out.time"].double() * 1000 + groot.ROUNDING).long(), IO["out.time_bucket"].long())


def test_gradients_of_a_table_and_a_norm_are_those_that_lerobot_recorded():
    policy, batch = copy.deepcopy(recorded()[0]), recorded_batch()
    policy.flow_loss(batch, IO["raw.noise"], TIME)["loss"].backward()
    inside = load_file(FIXTURE / "intermediate.safetensors")
    table = inside["grad.action_head.state_encoder.layer1.W"]  # [embodiments, in, out]
    norm, layer = policy.memory_norm.weight.grad, policy.state_encoder.first.layers[10].weight.grad
    assert norm is not None and layer is not None
    for mine, wanted in ((norm, inside["grad.action_head.vlln.weight"]), (layer.T, table[10])):
        atol = 1e-4 * float(wanted.abs().max())  # of the largest, as of norms
        torch.testing.assert_close(mine, wanted, rtol=0.0, atol=atol)
    assert not table[[row for row in range(32) if row != 10]].any()
