"""ACT, the Action Chunking Transformer: the baseline that needs neither pretraining nor language.

A ResNet encodes each camera; a transformer encoder reads its features, the state and a latent; a decoder
answers with one token for each action of the chunk. While training, the latent comes from a variational
encoder that sees the actions; when acting it is zero. Zhao et al. 2023, arXiv 2304.13705; the sizes and the
loss are those of LeRobot 0.6.1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vlafit.nn.batch import Batch, seen_images
from vlafit.nn.detr import DecoderLayer, EncoderLayer, sine_positions, sine_positions_2d
from vlafit.nn.parameters import build_policy, describe, select
from vlafit.nn.policy import Needs, ParameterInfo, Policy, required_actions
from vlafit.nn.precision import in_own_precision, layer_norm, matrix_dtype
from vlafit.nn.resnet import FrozenBatchNorm, Norm, ResNet
from vlafit.nn.rng import SampleRng
from vlafit.policies._common import imagenet_normalised, multiple, require, require_positive

L1, KL = "l1", "kl"
UNREACHED = "decoder.layers.0.self_attn.v_proj.weight"  # reads the decoder's input, which is zero
LATENT = "latent_proj.weight"  # reads the latent, which is zero without a variational encoder
WIDEST = 2**14  # channels of the last stage; ResNet-18 has 512
PARTS = {"vision": "vision", "encoder": "encoder", "decoder": "decoder", "vae": "vae"}


@dataclass(frozen=True)
class ActConfig:
    """Every size of an ACT policy."""

    image_size: int
    """Pixels along the side of the policy's images."""
    state_dim: int
    action_dim: int
    chunk: int
    resnet_width: int = 64
    """Channels of the image network's first stage; each further one has twice as many."""
    resnet_blocks: tuple[int, ...] = (2, 2, 2, 2)
    """Blocks of each stage. Four stages give one token for 32x32 pixels, three one for 16x16. ResNet-18."""
    resnet_norm: Norm = "frozen_batch"
    """frozen_batch: constants that come with pretrained weights; group: learns, for training from scratch."""
    width: int = 512
    heads: int = 8
    mlp: int = 3200
    encoder_layers: int = 4
    decoder_layers: int = 1
    vae: bool = True
    """Whether a variational encoder learns a latent from the actions."""
    vae_layers: int = 4
    latent: int = 32
    dropout: float = 0.1
    kl_weight: float = 10.0

    def __post_init__(self) -> None:
        require_positive({"": self})
        require(
            multiple("width", self.width, "heads", self.heads),
            (self.width % 4 == 0, f"width {self.width} is no multiple of 4, which sine positions need"),
            (
                min(self.resnet_blocks, default=0) > 0,
                f"resnet_blocks are {self.resnet_blocks}; name at least one",
            ),
            (
                self.resnet_width * 2 ** (len(self.resnet_blocks) - 1) <= WIDEST,
                f"resnet_width {self.resnet_width} doubles in each of {len(self.resnet_blocks)} "
                f"resnet_blocks; at most {WIDEST} channels are supported",
            ),
            (0 <= self.dropout < 1, f"dropout is {self.dropout}; it must be at least 0 and below 1"),
            (self.kl_weight >= 0, f"kl_weight is {self.kl_weight}; it must be at least 0"),
        )


SIZES: Mapping[str, ActConfig] = {
    "act": ActConfig(image_size=224, state_dim=14, action_dim=14, chunk=100),
    "act-small": ActConfig(
        image_size=64, state_dim=4, action_dim=4, chunk=8, resnet_width=16, resnet_blocks=(2, 2, 2),
        resnet_norm="group", width=128, heads=4, mlp=256, encoder_layers=2, vae_layers=2, latent=8,
        dropout=0.0,
    ),
    "act-tiny": ActConfig(
        image_size=32, state_dim=4, action_dim=4, chunk=4, resnet_width=8, width=16, heads=2, mlp=32,
        encoder_layers=1, vae_layers=1, latent=4,
    ),
}  # fmt: skip
"""The public size, one that two CPU cores train from scratch, and a tiny one for tests."""


class Encoder(nn.Module):
    """A stack of encoder layers."""

    def __init__(self, config: ActConfig, depth: int) -> None:
        super().__init__()
        c = config
        self.layers = nn.ModuleList(EncoderLayer(c.width, c.heads, c.mlp, c.dropout) for _ in range(depth))

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Encode `x` [b, l, d] at `positions` [l, d]; `mask` bool [b, l]."""
        for layer in self.layers:
            x = layer(x, positions, mask)
        return x


class Decoder(nn.Module):
    """One query for each action of the chunk, and layers that answer them from the encoder's output."""

    def __init__(self, config: ActConfig) -> None:
        super().__init__()
        c = config
        self.chunk = c.chunk
        self.query_embedding = nn.Embedding(c.chunk, c.width)
        self.layers = nn.ModuleList(
            DecoderLayer(c.width, c.heads, c.mlp, c.dropout) for _ in range(c.decoder_layers)
        )
        self.norm = nn.LayerNorm(c.width)

    def forward(self, memory: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Return [b, t, d] for `memory` [b, l, d] at `positions` [l, d]; `mask` bool [b, l]."""
        queries = self.query_embedding(torch.arange(self.chunk, device=memory.device)).to(
            memory.dtype
        )  # [t, d]
        x = memory.new_zeros(len(memory), *queries.shape)
        for layer in self.layers:
            x = layer(x, queries, memory, positions, mask)
        return layer_norm(self.norm, x)


class ActionEncoder(Encoder):
    """The variational encoder: state and actions to mean and log variance of the latent."""

    def __init__(self, config: ActConfig) -> None:
        super().__init__(config, config.vae_layers)
        c = config
        self.cls_embedding = nn.Embedding(1, c.width)
        self.state_proj = nn.Linear(c.state_dim, c.width)
        self.action_proj = nn.Linear(c.action_dim, c.width)
        self.latent_proj = nn.Linear(c.width, 2 * c.latent)

    def posterior(self, state: Tensor, actions: Tensor, is_real: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance [b, latent], float32; `is_real` bool [b, t]."""
        b = len(state)
        tokens = (
            self.cls_embedding(torch.zeros(b, 1, dtype=torch.int64, device=state.device)),
            in_own_precision(self.state_proj, state)[:, None],
            in_own_precision(self.action_proj, actions),
        )
        dtype = matrix_dtype(self.layers[0])
        x = torch.cat([token.to(dtype) for token in tokens], 1)  # [b, 2 + t, d]
        mask = torch.cat((is_real.new_ones(b, 2), is_real), 1)
        positions = sine_positions(x.shape[1], x.shape[2], x.device).to(dtype)
        out = in_own_precision(self.latent_proj, self(x, positions, mask)[:, 0]).float()
        mean, log_variance = out.chunk(2, -1)
        return mean, log_variance


class Act(Policy):
    """The network. Freshly constructed, its weights are undefined: see `build`, or load a checkpoint."""

    config: ActConfig

    def __init__(self, config: ActConfig) -> None:
        super().__init__()
        self.config = c = config
        self.vision = ResNet(c.resnet_width, c.resnet_blocks, c.resnet_norm)
        self.image_proj = nn.Conv2d(self.vision.channels, c.width, 1)
        self.state_proj = nn.Linear(c.state_dim, c.width)
        self.latent_proj = nn.Linear(c.latent, c.width)
        self.token_embedding = nn.Embedding(2, c.width)  # positions of latent and state
        self.encoder = Encoder(c, c.encoder_layers)
        self.decoder = Decoder(c)
        self.action_out_proj = nn.Linear(c.width, c.action_dim)
        self.vae = ActionEncoder(c) if c.vae else None

    def parts(self) -> list[ParameterInfo]:
        """Describe every parameter exactly once. What never learns is reported as dead.

        That is frozen batch norms, which are constants, and matrices that always read zeros.
        """
        unread = {UNREACHED} if self.vae is not None else {UNREACHED, LATENT}
        constant = {
            f"{name}.{leaf}"
            for name, module in self.named_modules()
            if isinstance(module, FrozenBatchNorm)
            for leaf, _ in module.named_parameters()
        }
        infos = describe(self, PARTS, default="projections")
        infos = [replace(i, kind="norm", dead=True) if i.name in constant else i for i in infos]
        return [replace(i, dead=True) if i.name in unread else i for i in infos]

    def blocks(self) -> list[nn.Module]:
        """Return the stages of the image network and all transformer layers."""
        own = [*self.vision.layers, *self.encoder.layers, *self.decoder.layers]
        return own if self.vae is None else [*own, *self.vae.layers]

    def needs(self) -> Needs:
        """Return what a codec for this policy must produce: no prompt."""
        c = self.config
        return Needs(c.image_size, c.state_dim, c.action_dim, c.chunk)

    def terms(self) -> Mapping[str, float]:
        """Return the terms of the loss: the absolute error, and the latent's divergence."""
        return {L1: 1.0} if self.vae is None else {L1: 1.0, KL: self.config.kl_weight}

    def counts(self, batch: Batch, draws: int) -> dict[str, float]:
        """Count unmasked action values, and samples."""
        if batch.action_mask is not None:
            values = int(batch.action_mask.sum())
        else:
            values = required_actions(batch).numel()
        counts = {L1: float(values * draws), KL: float(len(batch) * draws)}
        return {name: counts[name] for name in self.terms()}

    def forward(self, batch: Batch, rng: SampleRng) -> dict[str, Tensor]:
        """Return sums of the absolute error over actions, and of the divergence over samples.

        In evaluation mode the latent is zero and so is the divergence, as when acting.
        """
        self.check(batch)
        actions, mask = required_actions(batch), batch.action_mask
        if mask is None:
            mask = torch.ones_like(actions, dtype=torch.bool)
        latent, divergence = self._latent(batch.state, actions, mask, rng)
        predicted = self.predict(_normalised(batch), batch.image_mask, batch.state, latent)
        error = torch.where(mask[:, None], (predicted - actions[:, None]).abs(), 0.0)  # [b, k, t, a]
        sums = {L1: error.sum(), KL: divergence.sum() * latent.shape[1]}
        return {name: sums[name] for name in self.terms()}

    @torch.no_grad()
    def act(self, batch: Batch, rng: SampleRng) -> Tensor:
        """Return actions [b, t, a] for a latent of zero. Nothing is drawn."""
        self.check(batch)
        latent = batch.state.new_zeros(len(batch), 1, self.config.latent)
        return self.predict(_normalised(batch), batch.image_mask, batch.state, latent)[:, 0]

    def predict(self, images: Tensor, image_mask: Tensor, state: Tensor, latent: Tensor) -> Tensor:
        """Return actions [b, k, t, a], float32, for `latent` [b, k, z].

        `images` [b, n, 3, h, w] have ImageNet's mean and deviation, `image_mask` is bool [b, n].
        """
        b, k = latent.shape[:2]
        features = self.image_proj(self.vision(images.flatten(0, 1)))  # [b*n, d, h, w]
        height, width = features.shape[2:]
        pixels = features.flatten(2).transpose(1, 2).unflatten(0, (b, -1)).flatten(1, 2)  # [b, n*h*w, d]
        shared = torch.cat((in_own_precision(self.state_proj, state)[:, None], pixels), 1)
        tokens = in_own_precision(self.latent_proj, latent.flatten(0, 1))[:, None]  # [b*k, 1, d]
        x = torch.cat((tokens, shared.repeat_interleave(k, 0)), 1)  # [b*k, 2 + n*h*w, d]
        mask = torch.cat((image_mask.new_ones(b, 2), image_mask.repeat_interleave(height * width, 1)), 1)
        mask = mask.repeat_interleave(k, 0)
        places = sine_positions_2d(height, width, x.shape[2], x.device).repeat(images.shape[1], 1)
        positions = torch.cat((self.token_embedding(torch.arange(2, device=x.device)), places))
        dtype = matrix_dtype(self.encoder.layers[0])
        x, positions = x.to(dtype), positions.to(dtype)
        answer = self.decoder(self.encoder(x, positions, mask), positions, mask)
        return in_own_precision(self.action_out_proj, answer).float().unflatten(0, (b, k))

    def _latent(self, state: Tensor, actions: Tensor, mask: Tensor, rng: SampleRng) -> tuple[Tensor, Tensor]:
        """Return the latent [b, k, z] and each sample's divergence [b]."""
        b, z = len(state), self.config.latent
        if self.vae is None or not self.training:
            return state.new_zeros(b, rng.draws, z), state.new_zeros(b)
        mean, log_variance = self.vae.posterior(state, actions, mask.any(-1))
        noise = rng.normal(rng.draws, z).to(mean)
        latent = mean[:, None] + (0.5 * log_variance).exp()[:, None] * noise
        return latent, -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(-1)


def _normalised(batch: Batch) -> Tensor:
    """Return the images [b, n, 3, h, w] with ImageNet's mean and deviation."""
    images = imagenet_normalised(seen_images(batch.images, batch.image_mask))
    return images.unflatten(0, (len(batch), -1))


Config = ActConfig


def build(
    config: ActConfig, device: str | torch.device = "meta", generator: torch.Generator | None = None
) -> Act:
    """Build a policy: without storage on ``"meta"``, else with fresh weights drawn from `generator`.

    Without a generator, fresh weights are those of seed 0.
    """
    return build_policy(lambda: Act(config), init_weights, device, generator)


@torch.no_grad()
def init_weights(policy: Act, generator: torch.Generator, names: Sequence[str] | None = None) -> list[str]:
    """Draw fresh weights for `names` (None: all), on the CPU, and return the names that were drawn.

    Convolutions as He et al. 2015, transformer matrices uniformly as Glorot and Bengio 2010, embeddings
    standard normal, other matrices with variance 1 / fan-in; norms begin as the identity.
    """
    chosen = select(policy.parts(), names)
    parameters = dict(policy.named_parameters())
    for info in chosen:
        parameter = parameters[info.name]
        if parameter.ndim == 1:
            scale = info.kind == "norm" and info.name.endswith((".weight", ".running_var"))
            parameter.fill_(1.0 if scale else 0.0)
            continue
        draw = torch.empty(parameter.shape, dtype=torch.float32)
        if info.kind == "embedding":
            draw.normal_(0.0, 1.0, generator=generator)
        elif info.kind in ("attention", "mlp"):
            nn.init.xavier_uniform_(draw, generator=generator)
        elif info.part == "vision":
            nn.init.kaiming_normal_(draw, mode="fan_out", nonlinearity="relu", generator=generator)
        else:
            draw.normal_(0.0, draw[0].numel() ** -0.5, generator=generator)
        parameter.copy_(draw)
    return [info.name for info in chosen]
