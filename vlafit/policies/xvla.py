"""X-VLA: Florence-2's encoders, and a transformer that sees them, the noisy actions and soft prompts at once.

Each robot is a domain with soft prompts and action projections of its own. The head predicts the actions
themselves, not a velocity, and sampling mixes its last answer with the same noise again. Zheng et al. 2025,
arXiv 2510.10274; sizes, losses and sampling are those of LeRobot 0.6.1, but for three things: each sample
draws its own time where LeRobot spreads one draw over the batch, the action mask counts (a codec with
`mask_padding = false` counts padding, as LeRobot does), and a missing camera is left out of its own row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlafit.errors import CodecError
from vlafit.nn.attention import key_mask
from vlafit.nn.batch import Batch, seen_images
from vlafit.nn.florence2 import BartEncoder, Davit, Projector, sine_table, stage_side
from vlafit.nn.flow import interpolate
from vlafit.nn.kinds import Kind
from vlafit.nn.parameters import build_policy, describe, select
from vlafit.nn.policy import Needs, ParameterInfo, Policy, required_actions
from vlafit.nn.precision import in_own_precision, layer_norm, matrix_dtype
from vlafit.nn.rng import SampleRng
from vlafit.nn.soft_prompted import DomainLinear, JointTransformer, time_waves
from vlafit.policies._common import imagenet_normalised
from vlafit.policies._xvla_config import ExpertConfig, LanguageConfig, VisionConfig, require_fitting
from vlafit.policies._xvla_spaces import (
    ActionSpace,
    SpaceName,
    error_sums,
    hidden,
    layout_of,
    outputs,
    require_probabilities,
    space_of,
)

TIME_BELOW = 1 - 1e-5  # times are drawn from [0, TIME_BELOW): the authors' code
TIMES = "projector.visual_temporal_embed.weight"  # constant
FRESH_STD = 0.02  # of fresh soft prompts and positions: the authors' code


@dataclass(frozen=True)
class XVLAConfig:
    """Every size of an X-VLA policy."""

    vision: VisionConfig
    language: LanguageConfig
    expert: ExpertConfig
    image_size: int
    """Pixels along the side of the policy's images."""
    views: int
    """Cameras that the head has room for. The language model sees the first; one that is missing is zeros."""
    state_dim: int
    """Padded width of the state."""
    action_dim: int
    """Padded width of an action."""
    chunk: int
    """Actions predicted at once."""
    max_tokens: int
    """Tokens of the prompt, padding included: a prompt is always this long."""
    domains: int
    """Robots with soft prompts and projections of their own."""
    prompts: int
    """Soft prompts of each domain."""
    action_space: SpaceName = "ee6d"
    real_dim: int = 0
    """Action dimensions that count in the loss of the space "auto"; 0: all."""
    domain: int = 0
    """The domain of a batch that names none."""
    hetero: bool = False
    """Whether each domain has its own projections of image and text features, too."""
    attends_padding: bool = True
    """Whether padding of the prompt is read, as in LeRobot and the authors' code. False: it is masked, and a
    prompt's result does not depend on `max_tokens` and the padding token."""
    pad_token: int = 1
    """The token that pads a prompt: BART's. Its embedding never learns."""

    def __post_init__(self) -> None:
        require_fitting(self)


TOKENIZER = "facebook/bart-large"
"""The tokenizer of the public checkpoints, for messages."""

SIZES: Mapping[str, XVLAConfig] = {
    "xvla": XVLAConfig(  # Florence-2-large; X-VLA-0.9B and lerobot/xvla-base
        VisionConfig(
            stage_width=(256, 512, 1024, 2048), stage_blocks=(1, 1, 9, 1), stage_heads=(8, 16, 32, 64),
            stage_groups=(8, 16, 32, 64), window=12, positions=50, frames=100,
        ),
        LanguageConfig(width=1024, depth=12, mlp=4096, heads=16, vocab=51289, positions=4096),
        ExpertConfig(width=1024, depth=24, mlp=4096, heads=16, time_dim=32, positions=512),
        image_size=224, views=3, state_dim=20, action_dim=20, chunk=30, max_tokens=64, domains=30, prompts=32,
    ),
    "xvla-small": XVLAConfig(
        VisionConfig(
            stage_width=(32, 64, 96), stage_blocks=(1, 1, 1), stage_heads=(2, 4, 6), stage_groups=(2, 4, 6),
            window=8, positions=8, frames=4, kernel=(7, 3, 3), stride=(4, 2, 2), padding=(3, 1, 1),
            norm_first=(False, True, True), drop_path=0.0,
        ),
        LanguageConfig(
            width=128, depth=3, mlp=384, heads=4, vocab=512, positions=64, dropout=0.0, attention_dropout=0.0,
            activation_dropout=0.0,
        ),
        ExpertConfig(width=128, depth=4, mlp=384, heads=4, time_dim=32, positions=96, dropout=0.0),
        image_size=64, views=1, state_dim=8, action_dim=8, chunk=8, max_tokens=32, domains=4, prompts=4,
        action_space="auto", pad_token=0,
    ),
    "xvla-tiny": XVLAConfig(
        VisionConfig(
            stage_width=(16, 24), stage_blocks=(1, 1), stage_heads=(2, 2), stage_groups=(2, 4), window=3,
            positions=4, frames=3, kernel=(7, 3), stride=(4, 2), padding=(3, 1), norm_first=(False, True),
        ),
        LanguageConfig(width=24, depth=2, mlp=32, heads=4, vocab=300, positions=20),
        ExpertConfig(width=16, depth=3, mlp=32, heads=2, time_dim=8, positions=40),
        image_size=16, views=2, state_dim=6, action_dim=5, chunk=4, max_tokens=12, domains=4, prompts=3,
        action_space="auto", pad_token=0,
    ),
}  # fmt: skip
"""The public size, one that two CPU cores train from scratch, and a tiny one for tests."""


@dataclass(frozen=True)
class Context:
    """What all draws share: the tokens of images and text [b, l, d], soft prompts [b, p, d] (None: none), the
    domain int64 [b], and which of the tokens are attended to, bool [b, l] (None: all).
    """

    tokens: Tensor
    prompts: Tensor | None
    domain: Tensor
    valid: Tensor | None


class XVLA(Policy):
    """The network. Freshly constructed, its weights are undefined: see `build`, or load a checkpoint."""

    config: XVLAConfig
    steps: int | None = 10
    """Steps in which `act` refines its answer: LeRobot."""

    def __init__(self, config: XVLAConfig) -> None:
        super().__init__()
        self.config = c = config
        v, lang, width = c.vision, c.language, c.expert.width
        self.vision = Davit(
            v.stage_width, v.stage_blocks, v.stage_heads, v.stage_groups, v.window, v.kernel, v.stride,
            v.padding, v.norm_first, v.drop_path,
        )  # fmt: skip
        self.projector = Projector(v.stage_width[-1], lang.width, v.positions, v.frames)
        self.language = BartEncoder(
            lang.width,
            lang.depth,
            lang.mlp,
            lang.heads,
            lang.vocab,
            lang.positions,
            (lang.dropout, lang.attention_dropout, lang.activation_dropout),
            c.pad_token,
        )
        self.expert = JointTransformer(
            width, c.expert.depth, c.expert.heads, c.expert.mlp, c.expert.positions, c.expert.dropout,
            lang.width, c.domains if c.hetero else 0,
        )  # fmt: skip
        self.action_encoder = DomainLinear(c.domains, c.action_dim + c.state_dim + c.expert.time_dim, width)
        self.action_decoder = DomainLinear(c.domains, width, c.action_dim)
        self.soft_prompts = nn.Embedding(c.domains, c.prompts * width) if c.prompts else None
        self.space: ActionSpace = space_of(c.action_space, c.action_dim, c.real_dim)

    def parts(self) -> list[ParameterInfo]:
        """Describe every parameter exactly once. "projections" are those of each domain."""
        parts = {name: name for name in ("vision", "projector", "language", "expert", "soft_prompts")}
        if self.config.hetero:
            parts |= dict.fromkeys(("expert.vlm_proj", "expert.aux_visual_proj"), "projections")
        infos = describe(self, parts, default="projections")
        # With one view there are no others to project.
        dead = (TIMES, "expert.aux_visual_proj.") if self.config.views == 1 else (TIMES,)
        return [self._placed(replace(info, dead=info.name.startswith(dead))) for info in infos]

    def _placed(self, info: ParameterInfo) -> ParameterInfo:
        """Return `info` with kind and layer where Florence-2's names tell them otherwise than ours."""
        stages, words = self.config.vision.stage_blocks, info.name.split(".")
        if info.part == "vision" and words[1] == "blocks":
            info = replace(info, layer=sum(stages[: int(words[2])]) + int(words[3]))
        elif info.part == "expert" and words[1] == "blocks":
            info = replace(info, layer=int(words[2]))
        depths = {"vision": sum(stages), "expert": self.config.expert.depth}
        kinds: dict[str, Kind] = dict.fromkeys(("ffn", "fc1", "fc2"), "mlp")
        kinds |= dict.fromkeys(("attn", "window_attn", "channel_attn"), "attention")
        kind = next((kinds[word] for word in words if word in kinds), info.kind)
        return replace(
            info,
            layers=depths.get(info.part, info.layers),
            kind=kind if info.kind == "linear" else info.kind,
        )

    def blocks(self) -> list[nn.Module]:
        """Return the blocks of the image tower, and the layers of the language model and the head."""
        return [*self.vision.layers, *self.language.layers, *self.expert.blocks]

    def needs(self) -> Needs:
        """Return what a codec for this policy must produce."""
        c = self.config
        return Needs(
            image_size=c.image_size,
            state_dim=c.state_dim,
            action_dim=c.action_dim,
            chunk=c.chunk,
            prompt="text",
            max_tokens=c.max_tokens,
            vocabulary=c.language.vocab,
            framing="xvla",
            embodiments=c.domains,
            embodiment_field="domain",
            normalisation="mean_std" if c.action_space == "auto" else "identity",  # metres and 0 or 1
            cameras=c.views,
            action_layout=layout_of(c.action_space),
        )

    def check(self, batch: Batch) -> None:
        """Raise CodecError naming the first field of `batch` that does not fit."""
        super().check(batch)
        tokens, room = batch.prompt()[0].shape[1], self.config.max_tokens
        if tokens > room:
            raise CodecError(f"batch.tokens has {tokens} columns; this policy takes at most {room}")

    def terms(self) -> Mapping[str, float]:
        """Return the terms of the action space's loss and their weights."""
        return {name: term.weight for name, term in self.space.terms.items()}

    def counts(self, batch: Batch, draws: int) -> dict[str, float]:
        """Count the values of each term that the action mask leaves.

        Raises CodecError where a term is a cross entropy and its actions are not from 0 to 1.
        """
        actions, mask = required_actions(batch), batch.action_mask
        if mask is None:
            mask = torch.ones(actions.shape, dtype=torch.bool)
        require_probabilities(self.space, actions, mask)
        return {
            name: float(int(mask[..., list(term.channels)].sum()) * draws)
            for name, term in self.space.terms.items()
        }

    def tokens(self, batch: Batch, draws: int) -> int:
        """Count the tokens of all views and the prompt, and soft prompts and actions of every draw."""
        c, v = self.config, self.config.vision
        side = stage_side(c.image_size, v.kernel, v.stride, v.padding)
        context = c.views * (side * side + 1) + c.max_tokens
        return len(batch) * (context + draws * (c.chunk + c.prompts))

    def forward(self, batch: Batch, rng: SampleRng) -> dict[str, Tensor]:
        """Return the sum of each term over actions and draws; see `Policy.loss`."""
        self.check(batch)
        # A sample's draws are spread over the times as LeRobot spreads the samples of a batch.
        begin = rng.uniform()[:, None] + torch.arange(rng.draws) / rng.draws  # [b, k]
        time = (begin % TIME_BELOW).float()
        noise = rng.normal(rng.draws, self.config.chunk, self.config.action_dim)  # [b, k, t, a]
        device = batch.state.device
        return self.errors(batch, noise.to(device), time.to(device))

    def errors(self, batch: Batch, noise: Tensor, time: Tensor) -> dict[str, Tensor]:
        """Return the sum of each term for `noise` [b, k, t, a] at `time` [b, k], float32 scalars."""
        actions, mask = required_actions(batch)[:, None], batch.action_mask
        predicted = self.predict(self.encode(batch), batch.state, interpolate(actions, noise, time), time)
        kept = None if mask is None else mask[:, None].expand_as(predicted)
        return error_sums(self.space, predicted, actions.float().expand_as(predicted), kept)

    @torch.no_grad()
    def act(self, batch: Batch, rng: SampleRng) -> Tensor:
        """Sample actions [b, t, a] in `steps` steps; grippers are probabilities where the space says so."""
        noise = rng.normal(self.config.chunk, self.config.action_dim).to(batch.state.device)
        return self.sample(batch, noise, self.steps or 0)

    @torch.no_grad()
    def sample(self, batch: Batch, noise: Tensor, steps: int) -> Tensor:
        """Sample actions [b, t, a] from `noise` [b, t, a]: every step mixes the last answer with it."""
        if steps < 1:
            raise CodecError(f"sampling needs at least 1 step, not {steps}")
        self.check(batch)
        context = self.encode(batch)
        actions, time = torch.zeros_like(noise), noise.new_empty(len(noise), 1)
        for step in range(steps, 0, -1):
            noisy = interpolate(actions[:, None], noise[:, None], time.fill_(step / steps))
            actions = self.predict(context, batch.state, noisy, time)[:, 0]
        return outputs(self.space, actions)

    def encode(self, batch: Batch) -> Context:
        """Encode images, prompt and domain once."""
        c = self.config
        domain = batch.embodiment_id
        if domain is None:
            domain = torch.full((len(batch),), c.domain, dtype=torch.int64, device=batch.state.device)
        views = self._views(batch)  # [b, v, m, d]
        tokens, token_mask = batch.prompt()
        missing = c.max_tokens - tokens.shape[1]  # a prompt may have been trimmed
        real = F.pad(token_mask, (0, missing), value=False)
        tokens = torch.where(real, F.pad(tokens, (0, missing)), c.pad_token)
        words = self.language.embed_tokens(tokens)
        x = torch.cat((views[:, 0].to(words.dtype), words), 1)
        valid = None
        if not c.attends_padding:
            valid = F.pad(real, (views.shape[2], 0), value=True)  # [b, m + l]
        features = self.language(x, valid)
        rest = views[:, 1:].flatten(1, 2)
        if valid is not None:
            valid = F.pad(valid, (0, rest.shape[1]), value=True)
        prompts = None
        if self.soft_prompts is not None:
            prompts = self.soft_prompts(domain).unflatten(1, (c.prompts, -1))
        return Context(self.expert.project(features, rest, domain), prompts, domain, valid)

    def predict(self, context: Context, state: Tensor, noisy: Tensor, time: Tensor) -> Tensor:
        """Return actions [b, k, t, a] in float32 for `noisy` [b, k, t, a] at `time` [b, k]."""
        k, t = noisy.shape[1:3]
        state, noisy = hidden(self.space, state), hidden(self.space, noisy)
        embedded = time_waves(time, self.config.expert.time_dim)  # [b, k, e]
        inputs = (
            noisy,
            state[:, None, None].expand(-1, k, t, -1),
            embedded[:, :, None].expand(-1, -1, t, -1),
        )
        tokens = torch.cat([x.float() for x in inputs], -1).flatten(1, 2)  # [b, k * t, a + s + e]
        actions = in_own_precision(self.action_encoder, tokens, context.domain)
        dtype = matrix_dtype(self.expert.blocks[0])
        shared = context.tokens.to(dtype).repeat_interleave(k, 0)
        x = torch.cat((actions.to(dtype).unflatten(1, (k, t)).flatten(0, 1), shared), 1)  # [b * k, t + l, d]
        x = x + self.expert.position_embedding(torch.arange(x.shape[1], device=x.device)).to(dtype)
        if context.prompts is not None:
            x = torch.cat((x, context.prompts.to(dtype).repeat_interleave(k, 0)), 1)
        mask = None
        if context.valid is not None:
            mask = F.pad(context.valid, (t, x.shape[1] - t - context.valid.shape[1]), value=True)
            mask = key_mask(mask.repeat_interleave(k, 0))
        for layer in self.expert.blocks:
            x = layer(x, mask)
        y = layer_norm(self.expert.norm, x[:, :t]).unflatten(0, (-1, k)).flatten(1, 2)  # [b, k * t, d]
        return in_own_precision(self.action_decoder, y, context.domain).float().unflatten(1, (k, t))

    def _views(self, batch: Batch) -> Tensor:
        """Return the tokens of all views [b, v, m, d], each row's present cameras first, then zeros."""
        mask = batch.image_mask
        b, n = mask.shape
        images = imagenet_normalised(seen_images(batch.images, mask))
        # A quantised tower computes in its adapters' precision, the projector in its own.
        seen = self.vision(images)
        tokens = self.projector(seen.to(self.projector.image_projection.weight.dtype)).unflatten(0, (b, n))
        tokens = torch.where(mask[:, :, None, None], tokens, 0.0)
        if n > 1:
            order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
            tokens = tokens.gather(1, order[:, :, None, None].expand_as(tokens))
        return F.pad(tokens, (0, 0, 0, 0, 0, self.config.views - n))


Config = XVLAConfig


def build(
    config: XVLAConfig, device: str | torch.device = "meta", generator: torch.Generator | None = None
) -> XVLA:
    """Build a policy: without storage on ``"meta"``, else with fresh weights drawn from `generator`.

    Without a generator, fresh weights are those of seed 0.
    """
    return build_policy(lambda: XVLA(config), init_weights, device, generator)


@torch.no_grad()
def init_weights(policy: XVLA, generator: torch.Generator, names: Sequence[str] | None = None) -> list[str]:
    """Draw fresh weights for `names` (None: all), on the CPU, and return the names that were drawn.

    Matrices have variance 1 / fan-in, and so has each domain's; soft prompts and positions are near 0, norms
    begin as the identity and biases as 0. The table of times is its constant.
    """
    chosen = select(policy.parts(), names)
    parameters = dict(policy.named_parameters())
    for info in chosen:
        parameter = parameters[info.name]
        if info.name == TIMES:
            parameter.copy_(sine_table(*parameter.shape))
        elif info.kind == "norm" or info.name.endswith((".bias", ".bias.weight")):
            parameter.fill_(1.0 if info.kind == "norm" and info.name.endswith(".weight") else 0.0)
        else:
            draw = torch.empty(parameter.shape, dtype=torch.float32)
            parameter.copy_(draw.normal_(0.0, _fresh_std(policy, info, parameter), generator=generator))
    return [info.name for info in chosen]


def _fresh_std(policy: XVLA, info: ParameterInfo, parameter: Tensor) -> float:
    owner = policy.get_submodule(info.name.rpartition(".")[0].removesuffix(".fc"))
    if isinstance(owner, DomainLinear):
        return owner.inputs**-0.5 * (0.1 if owner is policy.action_decoder else 1.0)
    if info.kind == "embedding":
        return parameter.shape[1] ** -0.5 if info.name == "language.embed_tokens.weight" else FRESH_STD
    std = parameter[0].numel() ** -0.5
    deep = info.name.endswith((".proj.weight", ".out_proj.weight", ".fc2.weight"))  # into the residual stream
    return std * (2 * info.layers) ** -0.5 if deep and info.layers else std


@torch.no_grad()
def init_embodiment(policy: XVLA, number: int, generator: torch.Generator) -> list[str]:
    """Draw the rows of domain `number` anew, as `init_weights` does; return the names of their tables."""
    infos = [info for info in policy.parts() if info.part in ("projections", "soft_prompts")]
    for info in infos:
        table = policy.get_parameter(info.name)
        row = torch.zeros(table.shape[1])
        if not info.name.endswith(".bias.weight"):
            row.normal_(0.0, _fresh_std(policy, info, table), generator=generator)
        table[number] = row.to(table)
    return [info.name for info in infos]
