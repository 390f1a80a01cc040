"""Training-time real-time chunking: the first steps of a chunk are given, and what follows goes on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.variants import variants
from vlafit import checkpoints
from vlafit.errors import ConfigError, WeightsError
from vlafit.files import sha256
from vlafit.nn.batch import Batch
from vlafit.nn.clean_prefix import CleanPrefix, draw_known
from vlafit.nn.flow_policy import FlowPolicy
from vlafit.nn.policy import ERROR
from vlafit.nn.random_batch import random_batch
from vlafit.nn.rng import SampleRng, sample_rng
from vlafit.policies import build_family
from vlafit.train.delays import train_with_delays

FAMILIES = (("pi0", "pi0-tiny"), ("pi0", "pi05-tiny"), ("smolvla", "smolvla-tiny"))
ROWS = 6
STEPS = 80  # of the training that has to show a difference


def make(family: str, size: str, max_delay: int = 0) -> FlowPolicy:
    policy = build_family(family, size, device="cpu")
    assert isinstance(policy, FlowPolicy)
    draw = torch.Generator().manual_seed(1)
    for name, parameter in policy.named_parameters():
        if ".dense." in name:  # pi0.5's adaptive norms begin closed, and nothing would pass them
            torch.nn.init.normal_(parameter, std=0.1, generator=draw)
    train_with_delays(policy, max_delay)
    return policy.train()


def rng(draws: int = 2, epoch: int = 0, rows: int = ROWS) -> SampleRng:
    return sample_rng([(epoch, row) for row in range(rows)], seed=3, draws=draws)


def batch_for(policy: FlowPolicy) -> Batch:
    """A batch whose first sample ends after two steps, and whose last dimension is padding."""
    batch = random_batch(policy.needs(), ROWS)
    assert batch.action_mask is not None
    batch.action_mask[0, 2:] = False
    batch.action_mask[..., -1] = False
    return batch


@pytest.fixture(params=FAMILIES, ids=[size for _, size in FAMILIES])
def names(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


# ------------------------------------------------------------------------------------------------- the loss


def test_without_delays_and_in_validation_the_loss_is_the_plain_one_byte_for_byte(
    names: tuple[str, str],
) -> None:
    policy, delayed = make(*names), make(*names, max_delay=3)
    batch = batch_for(policy)
    noise, time = policy.draw(rng())
    plain = policy.flow_loss(batch, noise, time)
    assert torch.equal(policy.loss(batch, rng())[ERROR], plain["error_sum"])
    assert torch.equal(delayed.eval().loss(batch, rng())[ERROR], plain["error_sum"])
    assert policy.drawn_counts(batch, rng()) == policy.counts(batch, 2) == {ERROR: plain["mask_sum"].item()}


def test_a_delay_changes_neither_noise_nor_time(names: tuple[str, str]) -> None:
    policy, delayed = make(*names), make(*names, max_delay=3)
    source = rng()
    known = draw_known(source, 3, policy.config.chunk, None)
    noise, time = delayed.draw(source)
    assert known.any() and all(map(torch.equal, (noise, time), policy.draw(rng())))


def test_the_loss_is_that_of_the_steps_that_are_not_given_and_the_network_sees_the_others_clean(
    names: tuple[str, str],
) -> None:
    policy = make(*names, max_delay=3)
    batch, (noise, time) = batch_for(policy), policy.draw(rng())
    known = draw_known(rng(), 3, policy.config.chunk, batch.action_mask)  # [b, k, t]
    assert known.any() and not known.all()
    assert batch.actions is not None and batch.action_mask is not None
    noise, time = noise.transpose(0, 1), time.t()[..., None].expand(known.shape)
    time = torch.where(known, torch.zeros_like(time), time)
    noisy = time[..., None] * noise + (1 - time[..., None]) * batch.actions[:, None]
    with torch.no_grad():
        velocity = policy.denoise(policy.encode_prefix(batch), batch.state, noisy, time)
        got = policy.loss(batch, rng())[ERROR]
    learned = batch.action_mask[:, None] & ~known[..., None]
    error = (noise - batch.actions[:, None] - velocity).square()[learned]
    # The same numbers but for the order of the sum: 240 squares of up to some 30, each rounded by 2^-24.
    torch.testing.assert_close(got, error.sum(), rtol=240 * 2**-24, atol=0)
    assert policy.drawn_counts(batch, rng()) == {ERROR: float(learned.sum())}


def test_a_time_for_each_step_that_is_the_same_for_all_changes_nothing(names: tuple[str, str]) -> None:
    policy = make(*names).eval()
    batch, (noise, time) = batch_for(policy), policy.draw(rng())
    assert batch.actions is not None
    noisy, times = noise.transpose(0, 1), time.t()
    with torch.no_grad():
        prefix = policy.encode_prefix(batch)
        one = policy.denoise(prefix, batch.state, noisy, times)
        each = policy.denoise(prefix, batch.state, noisy, times[..., None].expand(noisy.shape[:3]))
    # Equal bits, but for pi0.5: its time is a matrix product over another number of rows. Rows of up to 16
    # terms are summed in another order in 12 products, behind norms that keep values near 1.
    bound = 12 * 16 * 2**-24 if names[1] == "pi05-tiny" else 0.0
    torch.testing.assert_close(each, one, rtol=0, atol=bound)


def test_every_delay_is_drawn_as_often_and_a_sample_always_has_a_step_left() -> None:
    many = sample_rng([(epoch, 0) for epoch in range(8000)], seed=0)
    delays = draw_known(many, 3, 8, None).sum(-1).flatten()
    counts = torch.bincount(delays, minlength=8)
    assert counts[4:].sum() == 0
    assert (counts[:4] - 2000).abs().max() < 5 * (8000 * 0.25 * 0.75) ** 0.5  # five standard deviations
    mask = torch.zeros(50, 8, 2, dtype=torch.bool)
    mask[:, :2] = True
    ended = draw_known(rng(rows=50), 7, 8, mask).sum(-1)
    assert ended.max() == 1


def test_delays_of_one_epoch_are_not_the_flow_times_of_another() -> None:
    delays = rng(draws=1, epoch=0, rows=200).side().uniform(1)
    others = [rng(draws=1, epoch=epoch, rows=200).uniform(1) for epoch in range(3)]
    assert not any(torch.isclose(delays, other, atol=1e-3).sum() > 5 for other in others)


# ------------------------------------------------------------------------------------------------- sampling


def test_a_chunk_begins_with_what_is_given_and_what_follows_depends_on_it(names: tuple[str, str]) -> None:
    policy = make(*names, max_delay=2).eval()
    batch = batch_for(policy)
    known = torch.arange(policy.config.chunk) < torch.tensor([0, 1, 2, 2, 2, 2])[:, None]
    given = torch.randn(ROWS, policy.config.chunk, policy.config.action_dim)
    free = policy.act(batch, rng())
    one = policy.act_after(batch, rng(), CleanPrefix(given, known))
    other = policy.act_after(batch, rng(), CleanPrefix(given + 1.0, known))
    assert torch.equal(one[known], given[known])
    follows = [not torch.equal(a[2:], b[2:]) for a, b in zip(one, other, strict=True)]
    assert follows == [False, True, True, True, True, True]
    # Nothing is given to the first row: what `act` answers, but for the order of sums (see above).
    torch.testing.assert_close(one[0], free[0], rtol=0, atol=12 * 16 * 2**-24)


@pytest.mark.parametrize("names", variants(FAMILIES, always=FAMILIES[:1]))
def test_a_trained_policy_goes_on_in_the_direction_in_which_it_began(names: tuple[str, str]) -> None:
    """Chunks stand still at +1 or -1, and nothing that is seen says which: only the first steps do."""
    torch.manual_seed(0)
    policy = make(*names, max_delay=2)
    needs = policy.needs()
    seen = random_batch(needs, 32)
    tokens, _ = seen.prompt()
    seen = replace(seen, images=seen.images[:1].expand(32, -1, -1, -1, -1) * 0, state=seen.state * 0,
                   tokens=tokens[:1].expand(32, -1))  # fmt: skip
    for module in policy.prefix_modules():
        module.requires_grad_(False)
    optimiser = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], 5e-3)
    sign = torch.ones(32)
    sign[::2] = -1.0
    batch = replace(seen, actions=sign[:, None, None].expand(32, needs.chunk, needs.action_dim).contiguous())
    for step in range(STEPS):
        keys = [(step, row) for row in range(32)]
        drawn = sample_rng(keys, seed=0, draws=4)
        count = policy.drawn_counts(batch, sample_rng(keys, seed=0, draws=4))[ERROR]
        (policy.loss(batch, drawn)[ERROR] / count).backward()
        optimiser.step()
        optimiser.zero_grad()
    policy.eval()
    wanted = -sign  # every row is asked to go on in the other direction than it learned
    given = wanted[:, None, None].expand(32, needs.chunk, needs.action_dim)
    known = (torch.arange(needs.chunk) < 2).expand(32, -1)
    drawn = sample_rng([(-1 + 10**6, row) for row in range(32)], seed=1)
    held = policy.act_after(batch, drawn, CleanPrefix(given, known))[:, 2:].mean((1, 2))
    free = policy.act(batch, sample_rng([(10**6, row) for row in range(32)], seed=1))[:, 2:].mean((1, 2))
    assert (held.sign() == wanted).float().mean() >= 0.95
    assert 0.2 < (free.sign() == wanted).float().mean() < 0.8


# ---------------------------------------------------------------------------------------- refusals, files


@pytest.mark.parametrize(
    ("family", "size"), [("groot", "groot-tiny"), ("act", "act-tiny"), ("xvla", "xvla-tiny")]
)
def test_a_family_that_cannot_be_given_steps_is_refused_by_name(family: str, size: str) -> None:
    policy = build_family(family, size, device="meta")
    train_with_delays(policy, 0)
    with pytest.raises(ConfigError, match=rf"train\.max_delay is 2, but {type(policy).__name__} cannot"):
        train_with_delays(policy, 2)


def test_a_delay_as_long_as_the_chunk_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_delay is 4, .* has 4 steps; set it to at most 3"):
        make("pi0", "pi0-tiny", max_delay=4)


def test_a_checkpoint_keeps_the_delay_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    plain, delayed = make("pi0", "pi0-tiny"), make("pi0", "pi0-tiny", max_delay=3)
    checkpoints.save(plain, tmp_path / "plain")
    checkpoints.save(delayed, tmp_path / "delayed")
    assert "max_delay" not in json.loads((tmp_path / "plain" / "policy.json").read_text())
    loaded = [checkpoints.load(tmp_path / name)[0] for name in ("plain", "delayed")]
    assert [policy.max_delay for policy in loaded] == [0, 3]
    described, manifest = (tmp_path / "delayed" / name for name in ("policy.json", "manifest.json"))
    listed = json.loads(manifest.read_text())
    for wrong in ("3", 3.0, -1, True, 10**9):
        described.write_text(json.dumps({**json.loads(described.read_text()), "max_delay": wrong}))
        listed["files"]["policy.json"] = sha256(described)
        manifest.write_text(json.dumps(listed))
        with pytest.raises(WeightsError, match=r"policy\.json: max_delay is .*from 0 to 4096"):
            checkpoints.load(tmp_path / "delayed")
