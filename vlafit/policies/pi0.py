"""pi0 and pi0.5: a SigLIP tower and a Gemma prefix, and a flow-matching action expert that attends to it.

The prefix (images, prompt) never sees the suffix (state, noisy actions), so the papers' joint attention is
two passes: the prefix yields each layer's keys and values, and the suffix's layers attend to them. K draws of
noise and time are K blocks of one suffix, which do not see each other and share prefix and state.

With `action_tokens`, pi0.5's language model also learns to write the actions as tokens of FAST, which attend
to the prefix in a third pass: prefix and suffix see none of them. With a strategy that stops the flow loss at
the prefix this is knowledge insulation (Driess et al. 2025, arXiv 2505.23705). What `act` does is the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlafit.nn.activations import silu
from vlafit.nn.attention import key_mask
from vlafit.nn.batch import Batch, seen_images, unit_images
from vlafit.nn.features import Cacheable, Features, stacked
from vlafit.nn.flow import Rounding, of_steps, time_embedding
from vlafit.nn.flow_policy import FlowPolicy
from vlafit.nn.gemma import Decoder
from vlafit.nn.packing import Packing, PrefixShape
from vlafit.nn.parameters import build_policy, draw_weights
from vlafit.nn.policy import TOKEN, ActionTokens, Needs, ParameterInfo
from vlafit.nn.precision import in_own_precision, matrix_dtype
from vlafit.nn.siglip import SiglipTower
from vlafit.policies import _pi0_shapes
from vlafit.policies._common import all_true_on_cpu, describe, multiple, require, require_positive, token_hits
from vlafit.policies._gemma_config import ExpertConfig, LanguageConfig, VisionConfig
from vlafit.policies._gemma_prefix import (
    Prefix,
    action_part,
    at_prompts_end,
    at_rows_end,
    cross_entropy,
    embedded,
    kept_prefix,
    logits_of_tokens,
    mean_of_rows,
    suffix_mask,
)


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
    action_tokens: int = 0
    """Longest chunk in tokens of FAST that the language model learns to write, beside the actions of the
    expert; 0: it learns to write none. What the policy answers with is the same."""
    token_weight: float = 1.0
    """Coefficient of the cross-entropy of these tokens; that of the actions' error is 1."""

    def __post_init__(self) -> None:
        v, lang = self.vision, self.language
        sections = {"": self, "vision.": v, "language.": lang, "expert.": self.expert}
        require_positive(sections, zero=("action_tokens",))
        require(
            (
                self.pi05 or not self.action_tokens,
                f"action_tokens is {self.action_tokens}, and only pi0.5 learns to write actions as tokens: "
                "the language model of pi0 does not read the state; set it to 0",
            ),
            (
                0 < self.token_weight < 1e6,
                f"token_weight is {self.token_weight}; it must be above 0 (action_tokens = 0: no token loss)",
            ),
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
    pi05: bool,
    vision: VisionConfig,
    language: LanguageConfig,
    expert: ExpertConfig,
    dims: tuple[int, int, int, int],
) -> Pi0Config:
    return Pi0Config(pi05, "prompt" if pi05 else "continuous", vision, language, expert, *dims)


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
        """Describe every parameter exactly once. A token loss reads the last layer of the language model."""
        depth = self.config.language.depth
        layers = {"vision": self.config.vision.depth, "language": depth, "expert": depth}
        infos = [describe(name, layers) for name, _ in self.named_parameters()]
        return [replace(info, dead=False) for info in infos] if self.config.action_tokens else infos

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
            action_tokens=ActionTokens(c.action_tokens, answered=False) if c.action_tokens else None,
            learns_answers=c.action_tokens > 0,
        )

    def terms(self) -> Mapping[str, float]:
        """Return the error of the actions, and the cross-entropy of action tokens where they are learned."""
        tokens = {TOKEN: self.config.token_weight} if self.config.action_tokens else {}
        return {**super().terms(), **tokens}

    def counts(self, batch: Batch, draws: int) -> dict[str, float]:
        """Count what the action mask leaves, in every draw, and samples with action tokens."""
        counts = super().counts(batch, draws)
        if self.config.action_tokens:
            counts[TOKEN] = float(int(action_part(batch)[1].any(1).sum()))
        return counts

    def prefix_modules(self) -> list[nn.Module]:
        """Return image tower, projector and language model."""
        return [self.vision, self.projector, self.language]

    def tokens(self, batch: Batch, draws: int) -> int:
        """Count patches and prompt, the state's token, the actions of every draw, and action tokens."""
        c = self.config
        images = batch.image_mask.shape[1] * (c.vision.image_size // c.vision.patch) ** 2
        state = 1 if c.state_input == "continuous" else 0
        targets = 0 if batch.target_tokens is None or not c.action_tokens else batch.target_tokens.shape[1]
        suffix = len(batch) * (state + draws * c.chunk + targets)
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
        return self._encoded(batch, fixed, output=False)

    def learned_prefix(self, batch: Batch) -> Prefix:
        """Return the prefix of a training step, with the output at its end where tokens are learned."""
        return self._encoded(batch, fixed=False, output=self.config.action_tokens > 0)

    def further_terms(self, batch: Batch, prefix: Prefix) -> dict[str, Tensor]:
        """Return the sum of each sample's mean cross-entropy of action tokens, where they are learned."""
        if not self.config.action_tokens:
            return {}
        tokens, mask = action_part(batch)
        logits = logits_of_tokens(self.language, self._heads_per_group, prefix, tokens, mask)
        error = cross_entropy(logits, tokens.long(), mask)
        return {TOKEN: mean_of_rows(error, mask)}

    def measured(self) -> tuple[str, ...]:
        """Return the name of the share of action tokens that are the likeliest ones, given those before."""
        return ("token_accuracy",) if self.config.action_tokens else ()

    @torch.no_grad()
    def measures(self, batch: Batch) -> Sequence[tuple[Tensor, float]]:
        """Return how many action tokens, without ends, are the likeliest, and how many there are."""
        if not self.config.action_tokens:
            return ()
        tokens, mask = action_part(batch)
        counted = mask & F.pad(mask, (0, 1))[:, 1:]  # all but the last, which ends the sequence
        return (token_hits(self.logits(batch), tokens, counted),)

    def logits(self, batch: Batch) -> Tensor:
        """Return float32 logits [b, m, v] of the action tokens of `batch`, each from those before it."""
        self.check(batch)
        prefix = self.learned_prefix(batch)
        return logits_of_tokens(self.language, self._heads_per_group, prefix, *action_part(batch))

    def _encoded(self, batch: Batch, fixed: bool, output: bool) -> Prefix:
        if batch.features is not None and batch.features.kind == "prefix":
            return kept_prefix(batch.features)
        learns = any(p.requires_grad for m in self.prefix_modules() for p in m.parameters())
        trains = torch.is_grad_enabled() and learns
        with torch.set_grad_enabled(trains):
            if batch.packing is not None and not fixed:
                return self._packed_prefix(batch, batch.packing, output)
            n = batch.images.shape[1]
            tokens, token_mask = batch.prompt()
            seen = self._patches(batch)
            # A quantised tower computes in its adapters' precision, the projector in its own.
            images = self.projector(seen.to(self.projector.weight.dtype))  # [b*n, patches, d]
            patches = images.shape[1]
            images = images.unflatten(0, (-1, n)).flatten(1, 2)  # [b, n*patches, d]
            words = embedded(self.language, tokens)
            x = torch.cat((images.to(words.dtype), words), 1)  # [b, l, d]
            mask = torch.cat((batch.image_mask.repeat_interleave(patches, 1), token_mask), 1)
            # Leaving out an all-true mask is faster, but changes the last bits.
            valid = None if not fixed and (batch.all_real or all_true_on_cpu(mask)) else mask
            count = mask.sum(1, keepdim=True)
            if valid is None:
                positions = torch.arange(x.shape[1], device=x.device)[None]
            else:
                positions = valid.cumsum(1) - 1
            keys = None if valid is None else key_mask(valid)
            y, layers = self.language(x, positions, keys, output=output)
            last = None if y is None else at_prompts_end(y, token_mask)
        return Prefix(layers, valid, count, last)

    def _packed_prefix(self, batch: Batch, packing: Packing, output: bool) -> Prefix:
        """Run the real images and words, and spread their keys and values over rows for the suffix."""
        images = self.projector(self._real_patches(batch, packing).to(self.projector.weight.dtype))
        x = packing.joined(images, embedded(self.language, packing.real_words(batch.prompt()[0])))
        segments = packing.segments
        y, layers = self.language(x, packing.positions, segments, output=output)
        spread = [(segments.spread(keys), segments.spread(values)) for keys, values in layers]
        last = None if y is None else at_rows_end(y, packing)
        return Prefix(spread, segments.valid(), segments.count(), last)

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
        """Keys and values of the prefix, where no tokens are learned, or the output of the image tower."""
        prefix = Cacheable("prefix", tuple(self.prefix_modules()), of="tokens")
        vision = Cacheable("vision", (self.vision,), of="cameras")
        return (vision,) if self.config.action_tokens else (prefix, vision)

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
        when = time_embedding(time, width, self.config.time_angles).to(
            tokens.dtype
        )  # [b, k, d] or [b, k, t, d]
        cond = None
        if self.config.pi05:
            cond = silu(in_own_precision(self.time_mlp_out, silu(in_own_precision(self.time_mlp_in, when))))
            cond = cond.flatten(1, 2) if cond.ndim == 4 else cond  # a condition for each draw, or each step
            x = tokens.flatten(1, 2)
        else:
            tokens = torch.cat((tokens, of_steps(when, t)), -1)
            tokens = in_own_precision(
                self.action_time_mlp_out, silu(in_own_precision(self.action_time_mlp_in, tokens))
            )
            x = torch.cat((in_own_precision(self.state_proj, state)[:, None], tokens.flatten(1, 2)), 1)
        shared = x.shape[1] - k * t  # 1 with a state token, which no draw changes: it does not see actions
        # Positions go on after the real tokens of the prefix: first the state, then each draw anew.
        own = torch.arange(t, device=x.device).repeat(k) + shared
        own = torch.cat((torch.arange(shared, device=x.device), own))
        positions = own + (prefix.count[:1] if prefix.valid is None else prefix.count)  # [b or 1, s]
        mask = suffix_mask(prefix, shared, k, t, self._heads_per_group)
        x = x.to(matrix_dtype(self.expert.layers[0]))
        y, _ = self.expert(x, positions, mask, prefix.layers, cond)
        y = y[:, shared:].unflatten(1, (k, t))
        return in_own_precision(self.action_out_proj, y).float()

    @property
    def _heads_per_group(self) -> int:
        return self.config.language.heads // self.config.language.kv_heads


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
