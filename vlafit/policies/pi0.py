"""pi0 and pi0.5: a SigLIP tower and a Gemma prefix, and a flow-matching action expert that attends to it.

The prefix (images, prompt) never sees the suffix (state, noisy actions), so the papers' joint attention is
two passes: the prefix yields each layer's keys and values, and the suffix's layers attend to them. K draws of
noise and time are K blocks of one suffix, which do not see each other and share prefix and state.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlafit.nn.activations import silu
from vlafit.nn.attention import draw_blocks, key_mask, per_query
from vlafit.nn.batch import Batch, seen_images, unit_images
from vlafit.nn.features import Cacheable, Features, stacked, unstacked
from vlafit.nn.flow import Rounding, of_steps, time_embedding
from vlafit.nn.flow_policy import FlowPolicy
from vlafit.nn.gemma import Decoder, KeysValues
from vlafit.nn.packing import Packing, PrefixShape
from vlafit.nn.parameters import build_policy, draw_weights
from vlafit.nn.policy import Needs, ParameterInfo
from vlafit.nn.precision import in_own_precision, matrix_dtype
from vlafit.nn.siglip import SiglipTower
from vlafit.policies import _pi0_shapes
from vlafit.policies._common import all_true_on_cpu, describe, multiple, require, require_positive


@dataclass(frozen=True)
class VisionConfig:
    """The SigLIP image tower."""

    width: int
    depth: int
    mlp: int
    heads: int
    patch: int
    """Pixels along a patch's side."""
    image_size: int
    """Pixels along an image's side; a multiple of `patch`."""


@dataclass(frozen=True)
class LanguageConfig:
    """The Gemma prefix decoder. Depth, heads and head_dim are the expert's, too."""

    width: int
    depth: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


@dataclass(frozen=True)
class ExpertConfig:
    """The action expert, as deep as the language model and with the same heads."""

    width: int
    mlp: int


@dataclass(frozen=True)
class Pi0Config:
    """Every size of a pi0 or pi0.5 policy."""

    pi05: bool
    """False: pi0 (time joins the action tokens). True: pi0.5 (time drives adaptive norms of the expert)."""
    state_input: Literal["continuous", "prompt", "none"]
    """How the state enters: as a token of the suffix (only pi0), as text in the prompt, or not at all."""
    vision: VisionConfig
    language: LanguageConfig
    expert: ExpertConfig
    state_dim: int
    """Padded width of the state."""
    action_dim: int
    """Padded width of an action."""
    chunk: int
    """Actions predicted at once."""
    max_tokens: int
    """Longest prompt, in tokens."""
    time_angles: Rounding = "float64"
    """In which precision the code that the weights come from computes time's angles; see `time_embedding`."""

    def __post_init__(self) -> None:
        v, lang = self.vision, self.language
        require_positive({"": self, "vision.": v, "language.": lang, "expert.": self.expert})
        require(
            (
                v.image_size % v.patch == 0,
                f"vision.image_size {v.image_size} is not a multiple of patch {v.patch}",
            ),
            multiple("vision.width", v.width, "vision.heads", v.heads),
            multiple("language.heads", lang.heads, "language.kv_heads", lang.kv_heads),
            (lang.head_dim % 2 == 0, f"language.head_dim {lang.head_dim} is odd; rotation needs pairs"),
            (
                self.expert.width % 2 == 0,
                f"expert.width {self.expert.width} is odd; time needs sine and cosine",
            ),
            (
                (self.state_input == "continuous") != self.pi05,
                f"state_input {self.state_input!r} does not go with pi05 {str(self.pi05).lower()}: pi0 has a"
                " state token ('continuous'), pi0.5 has none ('prompt' or 'none')",
            ),
        )


def _size(
    pi05: bool, vision: VisionConfig, language: LanguageConfig, expert: ExpertConfig, dims: tuple[int, ...]
) -> Pi0Config:
    state, action, chunk, tokens = dims
    state_input = "prompt" if pi05 else "continuous"
    return Pi0Config(pi05, state_input, vision, language, expert, state, action, chunk, tokens)


_PUBLIC = (  # SigLIP So400m/14, gemma_2b, gemma_300m: reference implementation
    VisionConfig(width=1152, depth=27, mlp=4304, heads=16, patch=14, image_size=224),
    LanguageConfig(width=2048, depth=18, mlp=16384, heads=8, kv_heads=1, head_dim=256, vocab=257152),
    ExpertConfig(width=1024, mlp=4096),
)
_SMALL = (
    VisionConfig(width=128, depth=4, mlp=384, heads=4, patch=16, image_size=64),
    LanguageConfig(width=128, depth=4, mlp=384, heads=4, kv_heads=1, head_dim=32, vocab=512),
    ExpertConfig(width=96, mlp=288),
)
_TINY = (
    VisionConfig(width=16, depth=2, mlp=24, heads=2, patch=4, image_size=8),
    LanguageConfig(width=24, depth=3, mlp=32, heads=4, kv_heads=1, head_dim=8, vocab=300),
    ExpertConfig(width=16, mlp=20),
)
TOKENIZER = (
    "google/paligemma-3b-pt-224 (gated on the Hugging Face Hub: accept its terms there, `hf auth login`)"
)
"""The tokenizer of the public checkpoints, for messages."""

SIZES: dict[str, Pi0Config] = {
    "pi0": _size(False, *_PUBLIC, (32, 32, 50, 48)),
    "pi05": _size(True, *_PUBLIC, (32, 32, 50, 200)),
    "pi0-small": _size(False, *_SMALL, (8, 8, 8, 32)),
    "pi05-small": _size(True, *_SMALL, (8, 8, 8, 64)),
    "pi0-tiny": _size(False, *_TINY, (6, 5, 4, 12)),
    "pi05-tiny": _size(True, *_TINY, (6, 5, 4, 12)),
}
"""The public sizes, the small ones that ship, and tiny ones for tests."""


@dataclass(frozen=True)
class Prefix:
    """The suffix's view of images and prompt: `layers` of keys and values, and which tokens are real.

    `valid` is bool [b, l], or None when all are; `count` int64 [b, 1] is the number of real tokens.
    """

    layers: list[KeysValues]
    valid: Tensor | None
    count: Tensor


class Pi0(FlowPolicy):
    """The network. Freshly constructed, its weights are undefined: see `build`, or load a checkpoint."""

    config: Pi0Config
    takes_prefix = True

    def __init__(self, config: Pi0Config) -> None:
        super().__init__()
        self.config = config
        v, lang, expert = config.vision, config.language, config.expert
        heads = (lang.heads, lang.kv_heads, lang.head_dim)
        self.vision = SiglipTower(v.width, v.depth, v.mlp, v.heads, v.patch, v.image_size)
        self.projector = nn.Linear(v.width, lang.width)
        self.language = Decoder(lang.width, lang.depth, lang.mlp, *heads, vocab=lang.vocab)
        cond_width = expert.width if config.pi05 else None
        self.expert = Decoder(expert.width, lang.depth, expert.mlp, *heads, cond_width=cond_width)
        self.action_in_proj = nn.Linear(config.action_dim, expert.width)
        self.action_out_proj = nn.Linear(expert.width, config.action_dim)
        if config.pi05:
            self.time_mlp_in = nn.Linear(expert.width, expert.width)
            self.time_mlp_out = nn.Linear(expert.width, expert.width)
        else:
            self.state_proj = nn.Linear(config.state_dim, expert.width)
            self.action_time_mlp_in = nn.Linear(2 * expert.width, expert.width)
            self.action_time_mlp_out = nn.Linear(expert.width, expert.width)

    def parts(self) -> list[ParameterInfo]:
        """Describe every parameter exactly once."""
        depth = self.config.language.depth
        layers = {"vision": self.config.vision.depth, "language": depth, "expert": depth}
        return [describe(name, layers) for name, _ in self.named_parameters()]

    def blocks(self) -> list[nn.Module]:
        """Return the layers of the image tower, the prefix decoder and the action expert."""
        return [*self.vision.layers, *self.language.layers, *self.expert.layers]

    def needs(self) -> Needs:
        """Return what a codec for this policy must produce. pi0.5 without state text takes pi0's prompt."""
        c = self.config
        prompt = "pi05" if c.state_input == "prompt" else "pi0"
        return Needs(
            c.vision.image_size,
            c.state_dim,
            c.action_dim,
            c.chunk,
            prompt,
            c.max_tokens,
            c.language.vocab,
            # openpi's for pi0.5, whose prompt writes states in bins over [-1, 1].
            normalisation="quantile" if c.pi05 else "mean_std",
        )

    def prefix_modules(self) -> list[nn.Module]:
        """Return image tower, projector and language model."""
        return [self.vision, self.projector, self.language]

    def tokens(self, batch: Batch, draws: int) -> int:
        """Count patches and prompt, the state's token if there is one, and the actions of every draw."""
        c = self.config
        images = batch.image_mask.shape[1] * (c.vision.image_size // c.vision.patch) ** 2
        state = 1 if c.state_input == "continuous" else 0
        suffix = len(batch) * (state + draws * c.chunk)
        if batch.packing is not None:
            return sum(batch.packing.segments.lengths) + suffix
        return len(batch) * (images + batch.prompt()[0].shape[1]) + suffix

    def packs(self) -> PrefixShape:
        """Return the shape of the prefix: rows of images and words."""
        c = self.config
        patches = (c.vision.image_size // c.vision.patch) ** 2
        return PrefixShape(patches, c.language.heads, c.language.kv_heads, c.language.head_dim)

    def encode_prefix(self, batch: Batch, fixed: bool = False) -> Prefix:
        """Run images and prompt once. Without a trainable prefix parameter, nothing is kept for backward."""
        if batch.features is not None and batch.features.kind == "prefix":
            return _kept_prefix(batch.features)
        learns = any(p.requires_grad for m in self.prefix_modules() for p in m.parameters())
        trains = torch.is_grad_enabled() and learns
        with torch.set_grad_enabled(trains):
            if batch.packing is not None and not fixed:
                return self._packed_prefix(batch, batch.packing)
            n = batch.images.shape[1]
            tokens, token_mask = batch.prompt()
            seen = self._patches(batch)
            # A quantised tower computes in its adapters' precision, the projector in its own.
            images = self.projector(seen.to(self.projector.weight.dtype))  # [b*n, patches, d]
            patches = images.shape[1]
            images = images.unflatten(0, (-1, n)).flatten(1, 2)  # [b, n*patches, d]
            words = self.language.embed_tokens(tokens) * math.sqrt(self.config.language.width)
            x = torch.cat((images.to(words.dtype), words), 1)  # [b, l, d]
            mask = torch.cat((batch.image_mask.repeat_interleave(patches, 1), token_mask), 1)
            # Leaving out an all-true mask is faster, but changes the last bits.
            valid = None if not fixed and (batch.all_real or all_true_on_cpu(mask)) else mask
            count = mask.sum(1, keepdim=True)
            if valid is None:
                positions = torch.arange(x.shape[1], device=x.device)[None]
            else:
                positions = valid.cumsum(1) - 1
            _, layers = self.language(x, positions, None if valid is None else key_mask(valid), output=False)
        return Prefix(layers, valid, count)

    def _packed_prefix(self, batch: Batch, packing: Packing) -> Prefix:
        """Run the real images and words, and spread their keys and values over rows for the suffix."""
        images = self.projector(self._real_patches(batch, packing).to(self.projector.weight.dtype))
        words = self.language.embed_tokens(packing.real_words(batch.prompt()[0]))
        x = packing.joined(images, words * math.sqrt(self.config.language.width))
        segments = packing.segments
        _, layers = self.language(x, packing.positions, segments, output=False)
        spread = [(segments.spread(keys), segments.spread(values)) for keys, values in layers]
        return Prefix(spread, segments.valid(), segments.count())

    def _real_patches(self, batch: Batch, packing: Packing) -> Tensor:
        """Return the image tower's output [m, patches, d] for real images, or what a cache kept of it."""
        if batch.features is not None:
            return packing.real_images(batch.features.tensors[0])
        return self.vision(unit_images(packing.real_images(batch.images)))

    def _patches(self, batch: Batch) -> Tensor:
        """Return the image tower's output [b*n, patches, d], or what a cache kept of it."""
        if batch.features is not None:
            return batch.features.tensors[0].flatten(0, 1)
        return self.vision(seen_images(batch.images, batch.image_mask))

    def cacheable(self) -> tuple[Cacheable, ...]:
        """Keys and values of the prefix, or the output of the image tower."""
        prefix = Cacheable("prefix", tuple(self.prefix_modules()), of="tokens")
        return prefix, Cacheable("vision", (self.vision,), of="cameras")

    @torch.no_grad()
    def features(self, kind: str, batch: Batch) -> Features:
        """Compute keys and values [b, l, layers, g, d], or patches [b, n, patches, d]."""
        if kind == "vision":
            patches = self._patches(batch).unflatten(0, batch.image_mask.shape)
            return Features(kind, (patches,), batch.image_mask)
        prefix = self.encode_prefix(batch)
        return Features(kind, stacked(prefix.layers), prefix.valid)

    def denoise(self, prefix: Prefix, state: Tensor, noisy: Tensor, time: Tensor) -> Tensor:
        """Return velocities [b, k, t, a] in float32 for `noisy` [b, k, t, a] at `time` [b, k] or [b, k, t].

        A time of each step is for a chunk whose first steps are given.
        """
        _, k, t, _ = noisy.shape
        width = self.config.expert.width
        tokens = in_own_precision(self.action_in_proj, noisy)  # [b, k, t, d]
        embedded = time_embedding(time, width, self.config.time_angles).to(
            tokens.dtype
        )  # [b, k, d] or [b, k, t, d]
        cond = None
        if self.config.pi05:
            cond = silu(
                in_own_precision(self.time_mlp_out, silu(in_own_precision(self.time_mlp_in, embedded)))
            )
            cond = cond.flatten(1, 2) if cond.ndim == 4 else cond  # a condition for each draw, or each step
            x = tokens.flatten(1, 2)
        else:
            tokens = torch.cat((tokens, of_steps(embedded, t)), -1)
            tokens = in_own_precision(
                self.action_time_mlp_out, silu(in_own_precision(self.action_time_mlp_in, tokens))
            )
            x = torch.cat((in_own_precision(self.state_proj, state)[:, None], tokens.flatten(1, 2)), 1)
        shared = x.shape[1] - k * t  # 1 with a state token, which no draw changes: it does not see actions
        # Positions go on after the real tokens of the prefix: first the state, then each draw anew.
        own = torch.arange(t, device=x.device).repeat(k) + shared
        own = torch.cat((torch.arange(shared, device=x.device), own))
        positions = own + (prefix.count[:1] if prefix.valid is None else prefix.count)  # [b or 1, s]
        mask = self._suffix_mask(prefix, shared, k, t)
        x = x.to(matrix_dtype(self.expert.layers[0]))
        y, _ = self.expert(x, positions, mask, prefix.layers, cond)
        y = y[:, shared:].unflatten(1, (k, t))
        return in_own_precision(self.action_out_proj, y).float()

    def _suffix_mask(self, prefix: Prefix, shared: int, draws: int, length: int) -> Tensor | None:
        """Return who sees whom in the suffix pass, or None when all see all."""
        s = shared + draws * length
        keys = None if prefix.valid is None else F.pad(prefix.valid, (0, s), value=True)  # [b, l + s]
        if shared == 0 and draws == 1:
            return None if keys is None else key_mask(keys)
        blocks = draw_blocks(shared, draws, length, prefix.count.device)
        mask = F.pad(blocks, (prefix.layers[0][0].shape[1], 0), value=True)[None]  # [1, s, l + s]
        if keys is not None:
            mask = mask & keys[:, None]
        return per_query(mask, self.config.language.heads // self.config.language.kv_heads)


def _kept_prefix(features: Features) -> Prefix:
    layers, valid = unstacked(features.tensors), features.valid
    if valid is None:
        count = torch.full((len(layers[0][0]), 1), layers[0][0].shape[1], device=layers[0][0].device)
    else:
        count = valid.sum(1, keepdim=True)
    return Prefix(layers, valid, count)


Config = Pi0Config


def model_name(config: Pi0Config) -> str:
    """Return "pi05" for a config of pi0.5, which this family holds too."""
    return "pi05" if config.pi05 else "pi0"


SHAPES = _pi0_shapes.SHAPES


def build(
    config: Pi0Config, device: str | torch.device = "meta", generator: torch.Generator | None = None
) -> Pi0:
    """Build a policy: without storage on ``"meta"``, else with fresh weights drawn from `generator`.

    Without a generator, fresh weights are those of seed 0.
    """
    return build_policy(lambda: Pi0(config), init_weights, device, generator)


def init_weights(policy: Pi0, generator: torch.Generator, names: Sequence[str] | None = None) -> list[str]:
    """Draw fresh weights for `names` (None: all) and return their names; see `nn.parameters.draw_weights`.

    Adaptive norms start closed (zero), as in the reference.
    """
    return draw_weights(policy, generator, names, unit_norms=("vision",))
