"""OpenVLA-OFT: DINOv2 and SigLIP towers and a Llama decoder that writes a whole chunk of actions in one pass.

Each dimension of each action is an empty token behind the prompt, all tokens see each other, and an MLP reads
the actions off their hidden states. Kim et al. 2025, arXiv 2502.19645, on OpenVLA (arXiv 2406.09246); sizes,
loss and predictions are those of the authors' code (moojink/openvla-oft). With FiLM one thing differs: the
mean of the instruction's embeddings leaves padding out, as the authors' code does only when it acts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vlafit.nn.attention import key_mask
from vlafit.nn.batch import Batch, seen_images
from vlafit.nn.llama import Decoder, RMSNorm, View
from vlafit.nn.mlp_resnet import MLPResNet
from vlafit.nn.parameters import build_policy, describe, draw_weights
from vlafit.nn.policy import ERROR, Needs, ParameterInfo, Policy, required_actions
from vlafit.nn.precision import in_own_precision, matrix_dtype
from vlafit.nn.prismatic import MLP, FusedProjector, LayerScale, Towers, TowerSizes
from vlafit.nn.rng import SampleRng
from vlafit.policies._common import imagenet_normalised, multiple, require, require_positive
from vlafit.policies._openvla_shapes import SHAPES as SHAPES

TOKENIZER = "openvla/openvla-7b"
"""The tokenizer of the public checkpoints, for messages."""
PARTS = {
    "vision": "vision", "projector": "projector", "language": "language", "lm_head": "language",
    "expert": "expert", "proprio_proj": "projections",
}  # fmt: skip


@dataclass(frozen=True)
class VisionConfig:
    """Both image towers."""

    dino: TowerSizes
    siglip: TowerSizes
    patch: int
    image_size: int
    registers: int = 4
    """DINOv2's extra tokens beside its class token."""


@dataclass(frozen=True)
class LanguageConfig:
    """The Llama decoder."""

    width: int
    depth: int
    mlp: int
    heads: int
    kv_heads: int
    vocab: int
    eps: float = 1e-6
    """Of its norms: that of transformers' LlamaConfig, which OpenVLA's config.json does not change."""


@dataclass(frozen=True)
class ExpertConfig:
    """The head that reads actions off hidden states."""

    width: int
    blocks: int = 2


@dataclass(frozen=True)
class OpenVLAConfig:
    """Every size of an OpenVLA-OFT policy."""

    vision: VisionConfig
    language: LanguageConfig
    expert: ExpertConfig
    state_dim: int
    action_dim: int
    chunk: int
    """Actions predicted at once."""
    max_tokens: int
    """Longest prompt, in tokens."""
    proprio: bool = True
    """Whether the state is read, as one token."""
    film: bool = False
    """Whether the instruction modulates the image towers (OFT+)."""
    eos: int = 2
    """The token that ends a sequence: Llama's."""

    def __post_init__(self) -> None:
        v, lang = self.vision, self.language
        require_positive(
            {
                "": self,
                "language.": lang,
                "expert.": self.expert,
                "vision.dino.": v.dino,
                "vision.siglip.": v.siglip,
            }
        )
        require(
            (v.patch >= 1, f"vision.patch is {v.patch}; it must be at least 1"),
            (v.registers >= 0, f"vision.registers is {v.registers}; it must be at least 0"),
            (
                v.image_size >= 1 and v.image_size % max(v.patch, 1) == 0,
                f"vision.image_size {v.image_size} is not a multiple of patch {v.patch}",
            ),
            *(
                multiple(f"{name}.width", t.width, f"{name}.heads", t.heads)
                for name, t in (("vision.dino", v.dino), ("vision.siglip", v.siglip))
            ),
            (
                lang.width % (2 * lang.heads) == 0,
                f"language.width {lang.width} is no multiple of twice language.heads {lang.heads}",
            ),
            multiple("language.heads", lang.heads, "language.kv_heads", lang.kv_heads),
            (0 < lang.eps < 1, f"language.eps is {lang.eps}; it must be above 0 and below 1"),
            (
                self.eos < lang.vocab,
                f"eos is {self.eos}; the vocabulary has tokens to at most {lang.vocab - 1}",
            ),
        )


SIZES: Mapping[str, OpenVLAConfig] = {
    # Llama 2, and timm's vit_large_patch14_reg4_dinov2 and vit_so400m_patch14_siglip_224
    "openvla-oft": OpenVLAConfig(
        VisionConfig(TowerSizes(1024, 24, 4096, 16), TowerSizes(1152, 27, 4304, 16), 14, image_size=224),
        LanguageConfig(width=4096, depth=32, mlp=11008, heads=32, kv_heads=32, vocab=32064),
        ExpertConfig(width=4096),
        state_dim=8, action_dim=7, chunk=8, max_tokens=96,
    ),
    "openvla-oft-small": OpenVLAConfig(
        VisionConfig(TowerSizes(96, 4, 256, 4), TowerSizes(96, 4, 256, 4), patch=16, image_size=64),
        LanguageConfig(width=128, depth=4, mlp=384, heads=4, kv_heads=4, vocab=512),
        ExpertConfig(width=128),
        state_dim=8, action_dim=8, chunk=8, max_tokens=64,
    ),
    "openvla-oft-tiny": OpenVLAConfig(
        VisionConfig(TowerSizes(16, 3, 24, 2), TowerSizes(24, 3, 40, 2), patch=4, image_size=8, registers=2),
        LanguageConfig(width=32, depth=2, mlp=48, heads=4, kv_heads=4, vocab=300),
        ExpertConfig(width=16),
        state_dim=6, action_dim=5, chunk=4, max_tokens=48, film=True,
    ),
}  # fmt: skip
"""The public size (two cameras, LIBERO's chunk), one that two CPU cores train, and a tiny one for tests."""


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
        self.expert = MLPResNet(c.action_dim * lang.width, c.expert.width, c.expert.blocks, c.action_dim)
        self.proprio_proj = MLP(c.state_dim, lang.width, lang.width) if c.proprio else None

    def parts(self) -> list[ParameterInfo]:
        """Describe every parameter exactly once.

        "expert" is the action head, "projections" the state's, "film" what modulates the towers. Dead are the
        output layer, and what lies behind the towers' second-to-last block.
        """
        infos = [self._placed(info) for info in describe(self, PARTS, default="projections")]
        depths = {"dino": self.config.vision.dino.depth, "siglip": self.config.vision.siglip.depth}
        unread = [f"vision.{tower}.layers.{depth - 1}." for tower, depth in depths.items()]
        unread += [f"vision.{tower}.norm." for tower in depths] + ["vision.siglip.pooling.", "lm_head."]
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
        )

    def tokens(self, batch: Batch, draws: int) -> int:
        """Count patches, prompt, state, actions and the end."""
        c = self.config
        images = batch.image_mask.shape[1] * (c.vision.image_size // c.vision.patch) ** 2
        rest = int(c.proprio) + c.chunk * c.action_dim + 1
        return len(batch) * (images + batch.prompt()[0].shape[1] + rest)

    def forward(self, batch: Batch, rng: SampleRng) -> dict[str, Tensor]:
        """Return the sum of the absolute error over actions; nothing is drawn, so every draw is the same."""
        self.check(batch)
        actions, mask = required_actions(batch), batch.action_mask
        error = (self.predict(batch) - actions).abs()
        if mask is not None:
            error = torch.where(mask, error, 0.0)
        return {ERROR: error.sum() * rng.draws}

    @torch.no_grad()
    def act(self, batch: Batch, rng: SampleRng) -> Tensor:
        """Return actions [b, t, a]. Nothing is drawn."""
        self.check(batch)
        return self.predict(batch)

    def predict(self, batch: Batch, words: Tensor | None = None) -> Tensor:
        """Return actions [b, t, a] in float32. `words` [b, d] replaces the instruction's mean for FiLM."""
        states = self.action_states(batch, words)
        return self.expert(states.unflatten(1, (self.config.chunk, -1)).flatten(2)).float()

    def action_states(self, batch: Batch, words: Tensor | None = None) -> Tensor:
        """Return the hidden states [b, t * a, d] that predict each dimension of each action.

        As a token predicts the next one, they are those one place before the actions' own.
        """
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
            fc1, fc2 = self.proprio_proj.fc1, self.proprio_proj.fc2
            hidden = nn.functional.gelu(in_own_precision(fc1, batch.state))
            seen.append(in_own_precision(fc2, hidden)[:, None].to(dtype))
            places.append(token_mask.new_ones(b, 1))
        prompt, end = prompt.to(dtype), end.to(dtype)
        slots = c.chunk * c.action_dim
        # The token that begins the sequence is before the images.
        x = torch.cat(
            (prompt[:, :1], *seen, prompt[:, 1:], prompt.new_zeros(b, slots, prompt.shape[2]), end), 1
        )
        real = token_mask.new_ones(b, slots + 1)
        valid = torch.cat((token_mask[:, :1], *places, token_mask[:, 1:], real), 1)
        mask = None if batch.all_real else key_mask(valid)
        y, _ = self.language(x, View(valid.cumsum(1) - 1, mask))
        assert y is not None
        begin = sum(part.shape[1] for part in seen)
        last = begin + token_mask.sum(1) - 1  # prompts are padded on the right
        before = y[torch.arange(b, device=y.device), last][:, None]
        first = begin + tokens.shape[1]
        return torch.cat((before, y[:, first : first + slots - 1]), 1)

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
