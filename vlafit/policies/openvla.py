"""OpenVLA and OpenVLA-OFT: DINOv2 and SigLIP towers and a Llama decoder that writes actions.

OpenVLA (Kim et al. 2024, arXiv 2406.09246) writes each dimension of an action as a token, one after the
other. OFT (Kim et al. 2025, arXiv 2502.19645) writes a whole chunk in one pass: each dimension of each action
is an empty token behind the prompt, all tokens see each other, and what is read off their hidden states are
tokens, numbers (an MLP), or the noise in actions that are given instead of empty tokens. `OpenVLAConfig.head`
says which. Sizes, losses and predictions are those of the authors' code (openvla, moojink/openvla-oft). With
FiLM one thing differs: the mean of the instruction's embeddings leaves padding out, as the authors' code does
only when it acts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlafit.errors import CodecError
from vlafit.nn import ddim
from vlafit.nn.attention import key_mask, per_query
from vlafit.nn.batch import Batch, seen_images
from vlafit.nn.gemma import KeysValues
from vlafit.nn.llama import Decoder, RMSNorm, View
from vlafit.nn.mlp_resnet import MLPResNet
from vlafit.nn.parameters import build_policy, describe, draw_weights
from vlafit.nn.policy import ERROR, TOKEN, ActionBins, Needs, ParameterInfo, Policy, required_actions
from vlafit.nn.precision import in_own_precision, matrix_dtype
from vlafit.nn.prismatic import MLP, FusedProjector, LayerScale, Towers
from vlafit.nn.rng import SampleRng
from vlafit.policies._common import imagenet_normalised, token_hits
from vlafit.policies._openvla_config import PUBLIC, OpenVLASizes
from vlafit.policies._openvla_config import TOKEN_HEADS as TOKEN_HEADS
from vlafit.policies._openvla_config import ExpertConfig as ExpertConfig
from vlafit.policies._openvla_config import LanguageConfig as LanguageConfig
from vlafit.policies._openvla_config import VisionConfig as VisionConfig
from vlafit.policies._openvla_shapes import SHAPES as SHAPES

TOKENIZER = "openvla/openvla-7b"
"""The tokenizer of the public checkpoints, for messages."""
PARTS = {
    "vision": "vision", "projector": "projector", "language": "language", "lm_head": "language",
    "expert": "expert", "proprio_proj": "projections",
}  # fmt: skip


@dataclass(frozen=True)
class OpenVLAConfig(OpenVLASizes):
    """Every size of an OpenVLA policy."""


SIZES: Mapping[str, OpenVLAConfig] = {name: OpenVLAConfig(**vars(sizes)) for name, sizes in PUBLIC.items()}


@dataclass(frozen=True)
class Prefix:
    """Embeddings of the first token, images, state, time and prompt, in this order, padded at the end."""

    x: Tensor  # [b, l, d]
    valid: Tensor  # bool [b, l]
    last: Tensor  # int64 [b], the place of the prompt's last token
    end: Tensor  # [b, 1, d], the embedding of the token that ends a sequence
    all_real: bool


class OpenVLA(Policy):
    """The network. Freshly constructed, its weights are undefined: see `build`, or load a checkpoint."""

    config: OpenVLAConfig

    def __init__(self, config: OpenVLAConfig) -> None:
        super().__init__()
        self.config = c = config
        v, lang = c.vision, c.language
        words = lang.width if c.film else None
        self.vision = Towers(v.dino, v.siglip, v.patch, v.image_size, v.registers, words)
        self.projector = FusedProjector(v.dino.width + v.siglip.width, lang.width)
        self.language = Decoder(
            lang.width, lang.depth, lang.mlp, lang.heads, lang.kv_heads, lang.width // lang.heads,
            vocab=lang.vocab, eps=lang.eps,
        )  # fmt: skip
        self.lm_head = nn.Linear(lang.width, lang.vocab, bias=False)
        self.expert = (
            None
            if c.writes_tokens
            else MLPResNet(c.action_dim * lang.width, c.expert.width, c.expert.blocks, c.action_dim)
        )
        self.proprio_proj = MLP(c.state_dim, lang.width, lang.width) if c.proprio else None
        self.noise_proj = MLP(1, lang.width, lang.width) if c.head == "diffusion" else None
        if c.head == "diffusion":
            self.steps = ddim.TRAIN_STEPS

    def parts(self) -> list[ParameterInfo]:
        """Describe every parameter exactly once.

        "expert" is the action head, "projections" what embeds state and noise, "film" what modulates the
        towers. Dead are what lies behind the towers' second-to-last block, and the output layer where actions
        are no tokens.
        """
        infos = [self._placed(info) for info in describe(self, PARTS, default="projections")]
        depths = {"dino": self.config.vision.dino.depth, "siglip": self.config.vision.siglip.depth}
        unread = [f"vision.{tower}.layers.{depth - 1}." for tower, depth in depths.items()]
        unread += [f"vision.{tower}.norm." for tower in depths] + ["vision.siglip.pooling."]
        unread += [] if self.config.writes_tokens else ["lm_head."]
        return [replace(info, dead=info.name.startswith(tuple(unread))) for info in infos]

    def _placed(self, info: ParameterInfo) -> ParameterInfo:
        """Return `info` with the part and kind that its module's class does not tell."""
        if ".film." in info.name:
            return replace(info, part="film")
        if isinstance(self.get_submodule(info.name.rpartition(".")[0]), LayerScale | RMSNorm):
            return replace(info, kind="norm")
        return replace(info, kind="mlp") if info.part == "expert" and info.kind == "linear" else info

    def blocks(self) -> list[nn.Module]:
        """Return the layers of both towers that are read, and those of the decoder."""
        return [*self.vision.dino.layers[:-1], *self.vision.siglip.layers[:-1], *self.language.layers]

    def needs(self) -> Needs:
        """Return what a codec for this policy must produce."""
        c = self.config
        longest = max(self._slots + 1, c.answer_tokens)
        return Needs(
            image_size=c.vision.image_size,
            state_dim=c.state_dim,
            action_dim=c.action_dim,
            chunk=c.chunk,
            prompt="openvla",
            max_tokens=c.max_tokens,
            vocabulary=c.language.vocab,
            framing="openvla",
            normalisation="openvla_quantile",
            action_bins=ActionBins(c.text_vocab, longest, c.eos, c.head == "tokens")
            if c.writes_tokens
            else None,
            learns_answers=c.head == "tokens",
        )

    def terms(self) -> Mapping[str, float]:
        """Return the only term: the cross-entropy of tokens, or the error of numbers."""
        return {TOKEN if self.config.writes_tokens else ERROR: 1.0}

    def counts(self, batch: Batch, draws: int) -> dict[str, float]:
        """Count the tokens that the loss predicts, or the numbers in every draw."""
        if not self.config.writes_tokens:
            return super().counts(batch, draws)
        return {TOKEN: float(int(_targets(batch)[1].sum()) * draws)}

    def tokens(self, batch: Batch, draws: int) -> int:
        """Count patches, prompt, state, time, actions and the end."""
        c = self.config
        images = batch.image_mask.shape[1] * (c.vision.image_size // c.vision.patch) ** 2
        written = self._slots + 1
        if c.head == "tokens" and batch.target_tokens is not None:
            written = batch.target_tokens.shape[1]
        rest = int(c.proprio) + written
        passes = draws if c.head == "diffusion" else 1
        return len(batch) * passes * (images + batch.prompt()[0].shape[1] + rest + int(c.head == "diffusion"))

    def forward(self, batch: Batch, rng: SampleRng) -> dict[str, Tensor]:
        """Return the sum of the cross-entropy of tokens, or of the error of numbers.

        The error is the absolute one of actions, or of the diffusion head the squared one of the noise. Only
        with the latter anything is drawn: otherwise every draw is the same.
        """
        self.check(batch)
        if self.config.writes_tokens:
            targets, counted = _targets(batch)
            error = F.cross_entropy(self.logits(batch).transpose(1, 2), targets, reduction="none")
            return {TOKEN: torch.where(counted, error, 0.0).sum() * rng.draws}
        actions, mask = required_actions(batch), batch.action_mask
        if self.config.head == "l1":
            error = (self.predict(batch) - actions).abs() * rng.draws
        else:
            steps = (rng.uniform(rng.draws) * ddim.TRAIN_STEPS).long().to(actions.device)
            noise = rng.normal(rng.draws, *actions.shape[1:]).to(actions)
            error = torch.zeros_like(actions)
            for step, one in zip(steps.unbind(1), noise.unbind(1), strict=True):
                error = error + (self.noise(batch, ddim.noised(actions, one, step), step) - one).square()
        if mask is not None:
            error = torch.where(mask, error, 0.0)
        return {ERROR: error.sum()}

    @torch.no_grad()
    def act(self, batch: Batch, rng: SampleRng) -> Tensor:
        """Return actions [b, t, a], or their tokens int64 [b, t * a] where actions are tokens.

        Tokens one after the other are the likeliest ones, decoded with a cache of keys and values until every
        row has ended; 0 stands after the one that ends a row.
        """
        self.check(batch)
        match self.config.head:
            case "tokens":
                return self._decode(batch)
            case "parallel_tokens":
                return self._head(self.action_states(batch)).argmax(-1)
            case "l1":
                return self.predict(batch)
            case "diffusion":
                noise = rng.normal(self.config.chunk, self.config.action_dim).to(batch.state.device)
                assert self.steps is not None
                return ddim.sample(lambda x, step: self.noise(batch, x, step), noise, self.steps)

    @torch.no_grad()
    def probe(self, batch: Batch, rng: SampleRng) -> Tensor:
        """Return the logits [b, 1, v] of the first action token, which show small changes; else actions."""
        if not self.config.writes_tokens:
            return self.act(batch, rng)
        self.check(batch)
        if self.config.head == "parallel_tokens":
            return self._head(self.action_states(batch)[:, :1])
        return self._begin(self.prefix(batch))[0]

    def measured(self) -> tuple[str, ...]:
        """Return the share of action tokens that are the likeliest ones, given those before."""
        return ("token_accuracy",) if self.config.writes_tokens else ()

    @torch.no_grad()
    def measures(self, batch: Batch) -> Sequence[tuple[Tensor, float]]:
        """Return how many action tokens are the likeliest ones, and how many there are."""
        if not self.config.writes_tokens:
            return ()
        targets, counted = _targets(batch)
        counted = counted & (targets != self.config.eos)
        return (token_hits(self.logits(batch), targets, counted),)

    def predict(self, batch: Batch, words: Tensor | None = None) -> Tensor:
        """Return actions [b, t, a] in float32. `words` [b, d] replaces the instruction's mean for FiLM."""
        return self._read(self.action_states(batch, words))

    def noise(self, batch: Batch, actions: Tensor, steps: Tensor) -> Tensor:
        """Return the noise [b, t, a], float32, in `actions` [b, t, a] after `steps` [b] of the schedule."""
        assert self.noise_proj is not None
        slots = _projected(self.noise_proj, actions.flatten(1)[..., None])
        time = ddim.embedded(steps, self.config.language.width)[:, None]
        return self._read(self._one_pass(self.prefix(batch, time=time), slots)[:, :-1])

    def _read(self, states: Tensor) -> Tensor:
        """Return what the head reads off the hidden states [b, t * a, d]."""
        assert self.expert is not None
        return self.expert(states.unflatten(1, (self.config.chunk, -1)).flatten(2)).float()

    def action_states(self, batch: Batch, words: Tensor | None = None) -> Tensor:
        """Return the hidden states [b, t * a, d] that predict each dimension of each action, in one pass."""
        return self._one_pass(self.prefix(batch, words))[:, :-1]

    def logits(self, batch: Batch) -> Tensor:
        """Return float32 logits [b, m, v] of `batch.target_tokens`; for tokens one after the other, from
        those before each."""
        targets, _ = _targets(batch)
        prefix = self.prefix(batch)
        if self.config.head == "parallel_tokens":
            return self._head(self._one_pass(prefix)[:, : targets.shape[1]])
        given = self.language.embed_tokens(targets[:, :-1])
        x = torch.cat((prefix.x, given.to(prefix.x.dtype)), 1)
        valid = torch.cat((prefix.valid, prefix.valid.new_ones(targets[:, :-1].shape)), 1)
        y, _ = self.language(x, self._causal(valid, x.shape[1]))
        assert y is not None
        return self._head(self._predictors(y, prefix, given.shape[1]))

    def prefix(self, batch: Batch, words: Tensor | None = None, time: Tensor | None = None) -> Prefix:
        """Return what stands before the actions; `time` [b, 1, d] stands behind the state."""
        c, b = self.config, len(batch)
        tokens, token_mask = batch.prompt()
        prompt = self.language.embed_tokens(tokens)
        end = self.language.embed_tokens(torch.full((b, 1), c.eos, device=tokens.device))
        if c.film and words is None:
            words = mean_embedding(prompt, token_mask, end)
        images = self.images(batch, words)  # [b, n * l, d]
        dtype = matrix_dtype(self.language.layers[0])
        seen = [images.to(dtype)]
        places = [batch.image_mask.repeat_interleave(images.shape[1] // batch.image_mask.shape[1], 1)]
        if self.proprio_proj is not None:
            seen.append(_projected(self.proprio_proj, batch.state)[:, None].to(dtype))
            places.append(token_mask.new_ones(b, 1))
        if time is not None:
            seen.append(time.to(dtype))
            places.append(token_mask.new_ones(b, 1))
        prompt = prompt.to(dtype)
        # The token that begins the sequence is before the images.
        x = torch.cat((prompt[:, :1], *seen, prompt[:, 1:]), 1)
        valid = torch.cat((token_mask[:, :1], *places, token_mask[:, 1:]), 1)
        last = x.shape[1] - tokens.shape[1] + token_mask.sum(1) - 1
        return Prefix(x, valid, last, end.to(dtype), batch.all_real)

    @property
    def _slots(self) -> int:
        return self.config.chunk * self.config.action_dim

    def _one_pass(self, prefix: Prefix, slots: Tensor | None = None) -> Tensor:
        """Return the hidden states [b, t * a + 1, d] that predict actions and end, all tokens seeing each
        other.

        `slots` [b, t * a, d] stand in the places of actions; without them these are empty.
        """
        b, _, d = prefix.x.shape
        slots = prefix.x.new_zeros(b, self._slots, d) if slots is None else slots.to(prefix.x.dtype)
        valid = torch.cat((prefix.valid, prefix.valid.new_ones(b, self._slots + 1)), 1)
        x = torch.cat((prefix.x, slots, prefix.end), 1)
        mask = None if prefix.all_real else key_mask(valid)
        y, _ = self.language(x, View(valid.cumsum(1) - 1, mask))
        assert y is not None
        return self._predictors(y, prefix, self._slots)

    def _predictors(self, y: Tensor, prefix: Prefix, actions: int) -> Tensor:
        """Return the outputs [b, actions + 1, d] one place before each action's and the end's.

        As a token predicts the next one, the first is that of the prompt's last token.
        """
        before = y[torch.arange(len(y), device=y.device), prefix.last][:, None]
        first = prefix.x.shape[1]
        return torch.cat((before, y[:, first : first + actions]), 1)

    def _causal(self, valid: Tensor, tokens: int) -> View:
        """Return the view of the last `tokens` of `valid` [b, l]: each sees the real ones up to itself."""
        length = valid.shape[1]
        lower = torch.ones(tokens, length, dtype=torch.bool, device=valid.device).tril(length - tokens)
        lang = self.config.language
        # Padding sees what is real before it; the begin of the sequence is, so no row of the mask is empty.
        mask = per_query(lower & valid[:, None], lang.heads // lang.kv_heads)
        return View((valid.cumsum(1) - 1)[:, length - tokens :], mask)

    def _begin(self, prefix: Prefix) -> tuple[Tensor, list[KeysValues]]:
        """Return the logits [b, 1, v] of the first action token, and the prefix's keys and values."""
        y, past = self.language(prefix.x, self._causal(prefix.valid, prefix.x.shape[1]))
        assert y is not None
        return self._head(self._predictors(y, prefix, 0)), past

    def _decode(self, batch: Batch) -> Tensor:
        """Return the likeliest tokens [b, t * a], one after the other."""
        prefix = self.prefix(batch)
        logits, past = self._begin(prefix)
        valid, b = prefix.valid, len(batch)
        out = torch.zeros(b, self._slots, dtype=torch.int64, device=valid.device)
        open_rows = valid.new_ones(b)
        for step in range(self._slots):
            token = logits[:, -1].argmax(-1)
            out[:, step] = torch.where(open_rows, token, 0)
            open_rows = open_rows & (token != self.config.eos)
            if step + 1 == self._slots or not open_rows.any():
                break
            valid = torch.cat((valid, valid.new_ones(b, 1)), 1)
            x = self.language.embed_tokens(token[:, None]).to(prefix.x.dtype)
            y, new = self.language(x, self._causal(valid, 1), past)
            assert y is not None
            past = [
                (torch.cat((k, a), 1), torch.cat((v, w), 1)) for (k, v), (a, w) in zip(past, new, strict=True)
            ]
            logits = self._head(y)
        return out

    def _head(self, states: Tensor) -> Tensor:
        """Return float32 logits [b, s, v]."""
        return self.lm_head(states.to(self.lm_head.weight.dtype)).float()

    def images(self, batch: Batch, words: Tensor | None) -> Tensor:
        """Return the projected features [b, n * l, d] of all cameras; `words` [b, d] is for FiLM."""
        n = batch.image_mask.shape[1]
        features = self.features(seen_images(batch.images, batch.image_mask), words, n)
        return (
            self.projector(features.to(self.projector.fc1.weight.dtype)).unflatten(0, (-1, n)).flatten(1, 2)
        )

    def features(self, images: Tensor, words: Tensor | None, cameras: int) -> Tensor:
        """Return the features of both towers side by side, [b * n, l, v], of `images` in [-1, 1]."""
        words = None if words is None else words.repeat_interleave(cameras, 0)
        return self.vision(imagenet_normalised(images), images, words)


def _targets(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the tokens [b, m] to predict and which of them count."""
    if batch.target_tokens is None or batch.target_mask is None:
        raise CodecError(
            "the batch has no target_tokens and target_mask, which the loss of action tokens needs"
        )
    return batch.target_tokens.long(), batch.target_mask


def _projected(mlp: MLP, x: Tensor) -> Tensor:
    """Return what `mlp` makes of `x` [..., i], in the precision of its weights."""
    return in_own_precision(mlp.fc2, F.gelu(in_own_precision(mlp.fc1, x)))


def mean_embedding(prompt: Tensor, mask: Tensor, end: Tensor) -> Tensor:
    """Return the mean [b, d] of the embeddings [b, l, d] that `mask` leaves, with the end [b, 1, d]."""
    kept = torch.where(mask[..., None], prompt, 0.0)
    return (kept.sum(1) + end[:, 0]) / (mask.sum(1, keepdim=True) + 1).to(prompt.dtype)


Config = OpenVLAConfig


def build(
    config: OpenVLAConfig, device: str | torch.device = "meta", generator: torch.Generator | None = None
) -> OpenVLA:
    """Build a policy: without storage on ``"meta"``, else with fresh weights drawn from `generator`.

    Without a generator, fresh weights are those of seed 0.
    """
    return build_policy(lambda: OpenVLA(config), init_weights, device, generator)


UNIT_NORMS = ("vision", "language", "expert")


@torch.no_grad()
def init_weights(
    policy: OpenVLA, generator: torch.Generator, names: Sequence[str] | None = None
) -> list[str]:
    """Draw fresh weights for `names` (None: all) and return their names; see `nn.parameters.draw_weights`.

    FiLM begins as the identity: its matrices are a tenth of others, its biases 0.
    """
    drawn = draw_weights(policy, generator, names, unit_norms=UNIT_NORMS)
    for name in drawn:
        if ".film." in name:
            policy.get_parameter(name).mul_(0.1)
    return drawn
