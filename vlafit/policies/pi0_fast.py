"""pi0-FAST: a SigLIP tower and a Gemma decoder that writes actions as tokens of the FAST tokenizer.

There is no action expert. Images and prompt see each other (the prefix); the action part sees them and its
own earlier tokens. The prefix never sees the action part, so both are passes of one decoder: the prefix
yields each layer's keys and values, and the action tokens attend to them. The codec makes action tokens of
actions and the reverse.

openpi and LeRobot train and ask it differently (`Pi0FastConfig.rules`): where the action part begins, and
over what the loss is averaged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from vlafit.nn.attention import key_mask
from vlafit.nn.batch import Batch, seen_images, unit_images
from vlafit.nn.gemma import Decoder, KeysValues
from vlafit.nn.packing import Packing, PrefixShape
from vlafit.nn.parameters import build_policy, draw_weights
from vlafit.nn.policy import TOKEN, ActionTokens, Needs, ParameterInfo, Policy
from vlafit.nn.rng import SampleRng
from vlafit.nn.siglip import SiglipTower
from vlafit.policies import _pi0_fast_shapes
from vlafit.policies._common import describe, multiple, require, require_positive, token_hits
from vlafit.policies._gemma_config import LanguageConfig, VisionConfig
from vlafit.policies._gemma_prefix import (
    Prefix,
    action_part,
    at_prompts_end,
    at_rows_end,
    continued,
    cross_entropy,
    embedded,
    mean_of_rows,
    tied_logits,
)

TOKENIZER = (
    "google/paligemma-3b-pt-224 (gated on the Hugging Face Hub: accept its terms there, `hf auth login`)"
)
"""The tokenizer of the public checkpoints, for messages."""


@dataclass(frozen=True)
class Pi0FastConfig:
    """Every size of a pi0-FAST policy."""

    vision: VisionConfig
    language: LanguageConfig
    chunk: int
    """Actions predicted at once."""
    state_dim: int
    """Most dimensions of a state, which enters as text."""
    action_dim: int
    """Most dimensions of an action."""
    max_tokens: int
    """Longest prompt, in tokens."""
    action_tokens: int
    """Longest action part, in tokens; decoding stops there."""
    rules: Literal["openpi", "lerobot"] = "openpi"
    """openpi: the prompt's last token predicts the first of the action part; every sample weighs the same;
    a missing camera is seen as a black image. lerobot: a token that begins a sequence predicts the first;
    every token of a batch weighs the same; a missing camera is masked."""
    tied: bool = True
    """Whether the output layer is the token embedding. LeRobot trains the two apart."""
    bos: int = 2
    """Token that begins a sequence: PaliGemma's."""
    eos: int = 1
    """Token that ends one: PaliGemma's."""
    temperature: float = 0.0
    """0: the likeliest token is taken; else tokens are drawn, from logits divided by it."""

    def __post_init__(self) -> None:
        v, lang = self.vision, self.language
        sizes = ("chunk", "state_dim", "action_dim", "max_tokens", "action_tokens")
        require_positive({"vision.": v, "language.": lang})
        require(
            *(
                (getattr(self, size) >= 1, f"{size} is {getattr(self, size)}; it must be at least 1")
                for size in sizes
            ),
            (
                v.image_size % v.patch == 0,
                f"vision.image_size {v.image_size} is not a multiple of patch {v.patch}",
            ),
            multiple("vision.width", v.width, "vision.heads", v.heads),
            multiple("language.heads", lang.heads, "language.kv_heads", lang.kv_heads),
            (lang.head_dim % 2 == 0, f"language.head_dim {lang.head_dim} is odd; rotation needs pairs"),
            (
                all(0 <= token < lang.vocab for token in (self.bos, self.eos)),
                f"bos {self.bos} and eos {self.eos} must be tokens of the vocabulary: at least 0, at most "
                f"{lang.vocab - 1}",
            ),
            (0 <= self.temperature < 1e6, f"temperature is {self.temperature}; it must be at least 0"),
        )


_VISION = VisionConfig(width=1152, depth=27, mlp=4304, heads=16, patch=14, image_size=224)  # SigLIP So400m/14
_GEMMA = LanguageConfig(  # gemma_2b
    width=2048, depth=18, mlp=16384, heads=8, kv_heads=1, head_dim=256, vocab=257152
)

SIZES: dict[str, Pi0FastConfig] = {
    # openpi, training/config.py: pi0_fast_droid has 10 steps of 8 dimensions, and 250 tokens in all; LeRobot
    # has 200 tokens of prompt and 256 of actions.
    "pi0-fast": Pi0FastConfig(_VISION, _GEMMA, 10, 32, 32, max_tokens=200, action_tokens=256),
    "pi0-fast-small": Pi0FastConfig(
        VisionConfig(width=128, depth=4, mlp=384, heads=4, patch=16, image_size=64),
        LanguageConfig(width=128, depth=4, mlp=384, heads=4, kv_heads=1, head_dim=32, vocab=1024),
        8, 8, 8, max_tokens=64, action_tokens=64, bos=1, eos=2,
    ),
    "pi0-fast-tiny": Pi0FastConfig(
        VisionConfig(width=16, depth=2, mlp=24, heads=2, patch=4, image_size=8),
        LanguageConfig(width=24, depth=2, mlp=32, heads=4, kv_heads=1, head_dim=8, vocab=700),
        4, 6, 5, max_tokens=40, action_tokens=32, bos=1, eos=2,
    ),
}  # fmt: skip
"""The public size, and small and tiny ones whose special tokens are those of a tokenizer made from data."""


class Pi0Fast(Policy):
    """The network. Freshly constructed, its weights are undefined: see `build`, or load a checkpoint."""

    config: Pi0FastConfig

    def __init__(self, config: Pi0FastConfig) -> None:
        super().__init__()
        self.config = config
        v, lang = config.vision, config.language
        self.vision = SiglipTower(v.width, v.depth, v.mlp, v.heads, v.patch, v.image_size)
        self.projector = nn.Linear(v.width, lang.width)
        self.language = Decoder(
            lang.width, lang.depth, lang.mlp, lang.heads, lang.kv_heads, lang.head_dim, vocab=lang.vocab
        )
        if not config.tied:
            self.lm_head = nn.Linear(lang.width, lang.vocab, bias=False)

    def parts(self) -> list[ParameterInfo]:
        """Describe every parameter exactly once. An output layer of its own is of the part "language"."""
        layers = {"vision": self.config.vision.depth, "language": self.config.language.depth}
        infos = [describe(name, layers) for name, _ in self.named_parameters()]
        return [replace(info, dead=False) for info in infos]  # unlike pi0's, the last layer is read

    def blocks(self) -> list[nn.Module]:
        """Return the layers of the image tower and the decoder."""
        return [*self.vision.layers, *self.language.layers]

    def needs(self) -> Needs:
        """Return what a codec for this policy must produce."""
        c = self.config
        form = "pi0_fast" if c.rules == "openpi" else "pi0_fast_lerobot"
        tokens = ActionTokens(c.action_tokens, c.bos, c.eos, begins_with_bos=c.rules == "lerobot")
        return Needs(
            c.vision.image_size,
            c.state_dim,
            c.action_dim,
            c.chunk,
            form,
            c.max_tokens,
            c.language.vocab,
            normalisation="quantile",  # openpi's; the prompt writes states in bins over [-1, 1]
            sees_missing=c.rules == "openpi",  # openpi, models/pi0_fast.py
            action_tokens=tokens,
            learns_answers=True,
        )

    def terms(self) -> Mapping[str, float]:
        """Return the only term, the cross-entropy of action tokens."""
        return {TOKEN: 1.0}

    def counts(self, batch: Batch, draws: int) -> dict[str, float]:
        """Count samples (openpi's rules) or predicted tokens (LeRobot's)."""
        _, mask = self._targets(batch)
        real = mask.sum(1)
        return {TOKEN: float(int(real.sum()) if self.config.rules == "lerobot" else int((real > 0).sum()))}

    def tokens(self, batch: Batch, draws: int) -> int:
        """Count patches, prompt and action tokens."""
        c = self.config
        images = batch.image_mask.shape[1] * (c.vision.image_size // c.vision.patch) ** 2
        targets = 0 if batch.target_tokens is None else batch.target_tokens.shape[1]
        if batch.packing is not None:
            return sum(batch.packing.segments.lengths) + len(batch) * targets
        return len(batch) * (images + batch.prompt()[0].shape[1] + targets)

    def packs(self) -> PrefixShape:
        """Return the shape of the prefix: rows of images and words."""
        c = self.config
        patches = (c.vision.image_size // c.vision.patch) ** 2
        lang = c.language
        return PrefixShape(patches, lang.heads, lang.kv_heads, lang.head_dim, self.needs().sees_missing)

    def forward(self, batch: Batch, rng: SampleRng) -> dict[str, Tensor]:
        """Return the sum of the cross-entropy, or of each sample's mean (openpi's rules)."""
        targets, mask = self._targets(batch)
        error = cross_entropy(self.logits(batch), targets, mask)  # [b, m]
        return {TOKEN: mean_of_rows(error, mask) if self.config.rules == "openpi" else error.sum()}

    def measured(self) -> tuple[str, ...]:
        """Return the name of the share of tokens that are the likeliest ones, given those before."""
        return ("token_accuracy",)

    @torch.no_grad()
    def measures(self, batch: Batch) -> Sequence[tuple[Tensor, float]]:
        """Return how many tokens of the loss, without ends, are the likeliest, and how many there are."""
        targets, mask = self._targets(batch)
        counted = mask & (targets != self.config.eos)
        return (token_hits(self.logits(batch), targets, counted),)

    def logits(self, batch: Batch) -> Tensor:
        """Return the logits [b, m, v] of the tokens that `batch.target_tokens` should be predicted as.

        float32; for each token of the loss, in order, from those before it.
        """
        self.check(batch)
        tokens, mask = action_part(batch)
        before, given = tokens[:, :-1], mask[:, :-1]
        prefix = self._prefix(batch)
        x, _ = self._continue(prefix, prefix.layers, before, given)
        if prefix.last is not None:
            x = torch.cat((prefix.last, x), 1)
        return self._head(x)

    @torch.no_grad()
    def act(self, batch: Batch, rng: SampleRng) -> Tensor:
        """Return action tokens int64 [b, m], 0 after the one that ends a row; see `vlafit.codec`.

        Every row is decoded until all have ended, or `action_tokens` are reached, with a cache of keys and
        values.
        """
        self.check(batch)
        c, b = self.config, len(batch)
        uniform = rng.uniform(c.action_tokens) if c.temperature else None
        prefix = self._prefix(batch)
        past, count = prefix.layers, 0
        if prefix.last is None:
            first = torch.full((b, 1), c.bos, device=batch.state.device)
            x, past = self._extend(prefix, past, first, count)
            count = 1
        else:
            x = prefix.last
        out = torch.zeros(b, c.action_tokens, dtype=torch.int64, device=batch.state.device)
        open_rows = torch.ones(b, dtype=torch.bool, device=batch.state.device)
        for step in range(c.action_tokens):
            token = self._choose(self._head(x[:, -1:])[:, 0], None if uniform is None else uniform[:, step])
            out[:, step] = torch.where(open_rows, token, 0)
            open_rows = open_rows & (token != c.eos)
            if not open_rows.any() or step + 1 == c.action_tokens:
                break
            x, past = self._extend(prefix, past, token[:, None], count)
            count += 1
        return out

    @torch.no_grad()
    def probe(self, batch: Batch, rng: SampleRng) -> Tensor:
        """Return the logits [b, 1, v] of the first action token: unlike tokens, they show small changes."""
        self.check(batch)
        prefix = self._prefix(batch)
        if prefix.last is not None:
            return self._head(prefix.last)
        first = torch.full((len(batch), 1), self.config.bos, device=batch.state.device)
        x, _ = self._continue(prefix, prefix.layers, first, torch.ones_like(first, dtype=torch.bool))
        return self._head(x)

    def _targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the tokens to predict [b, m], and which of them count: all but a first that was given."""
        tokens, mask = action_part(batch)
        given = 1 if self.config.rules == "lerobot" else 0
        return tokens[:, given:].long(), mask[:, given:]

    def _prefix(self, batch: Batch) -> Prefix:
        """Run images and prompt once."""
        if batch.packing is not None:
            return self._packed_prefix(batch, batch.packing)
        c, n = self.config, batch.images.shape[1]
        tokens, token_mask = batch.prompt()
        cameras = batch.image_mask | self.needs().sees_missing
        seen = self.vision(seen_images(batch.images, cameras))
        images = self.projector(seen.to(self.projector.weight.dtype))  # [b*n, patches, d]
        patches = images.shape[1]
        words = embedded(self.language, tokens)
        x = torch.cat((images.unflatten(0, (-1, n)).flatten(1, 2).to(words.dtype), words), 1)  # [b, l, d]
        valid = torch.cat((cameras.repeat_interleave(patches, 1), token_mask), 1)
        wanted = c.rules == "openpi"
        y, layers = self.language(x, valid.cumsum(1) - 1, key_mask(valid), output=wanted)
        last = None if y is None else at_prompts_end(y, token_mask)
        return Prefix(layers, valid, valid.sum(1, keepdim=True), last)

    def _packed_prefix(self, batch: Batch, packing: Packing) -> Prefix:
        """Run the real images and words, and spread their keys and values over rows."""
        segments, wanted = packing.segments, self.config.rules == "openpi"
        patches = self.vision(unit_images(packing.real_images(batch.images)))
        images = self.projector(patches.to(self.projector.weight.dtype))
        x = packing.joined(images, embedded(self.language, packing.real_words(batch.prompt()[0])))
        y, layers = self.language(x, packing.positions, segments, output=wanted)
        spread = [(segments.spread(keys), segments.spread(values)) for keys, values in layers]
        last = None if y is None else at_rows_end(y, packing)
        return Prefix(spread, segments.valid(), segments.count(), last)

    def _extend(
        self, prefix: Prefix, past: list[KeysValues], token: Tensor, count: int
    ) -> tuple[Tensor, list[KeysValues]]:
        """Run one more action token [b, 1] after `count` others; return the output and the longer past."""
        real = torch.ones(len(token), count + 1, dtype=torch.bool, device=token.device)
        y, new = self._continue(prefix, past, token, real)
        return y, [
            (torch.cat((k, a), 1), torch.cat((v, b), 1)) for (k, v), (a, b) in zip(past, new, strict=True)
        ]

    def _continue(
        self, prefix: Prefix, past: list[KeysValues], tokens: Tensor, real: Tensor
    ) -> tuple[Tensor, list[KeysValues]]:
        """Run action tokens [b, s] after `past`: the prefix, and the action tokens before them.

        `real` [b, e + s] says which action tokens count, earlier ones first. Returns the output and the new
        tokens' own keys and values.
        """
        lang = self.config.language
        return continued(self.language, lang.heads // lang.kv_heads, prefix, past, tokens, real)

    def _head(self, x: Tensor) -> Tensor:
        """Return float32 logits [b, s, v] of the decoder's output."""
        if not self.config.tied:
            return self.lm_head(x).float()
        return tied_logits(self.language, x)

    def _choose(self, logits: Tensor, uniform: Tensor | None) -> Tensor:
        """Return a token [b] of `logits` [b, v]: the likeliest, or the one at `uniform` [b] of all drawn."""
        if uniform is None:
            return logits.argmax(-1)
        shares = (logits.double() / self.config.temperature).softmax(-1).cumsum(-1)
        return (shares < uniform.to(shares)[:, None]).sum(-1).clamp(max=logits.shape[-1] - 1)


Config = Pi0FastConfig
SHAPES = _pi0_fast_shapes.SHAPES


def build(
    config: Pi0FastConfig, device: str | torch.device = "meta", generator: torch.Generator | None = None
) -> Pi0Fast:
    """Build a policy: without storage on ``"meta"``, else with fresh weights drawn from `generator`.

    Without a generator, fresh weights are those of seed 0.
    """
    return build_policy(lambda: Pi0Fast(config), init_weights, device, generator)


def init_weights(
    policy: Pi0Fast, generator: torch.Generator, names: Sequence[str] | None = None
) -> list[str]:
    """Draw fresh weights for `names` (None: all) and return their names; see `nn.parameters.draw_weights`."""
    return draw_weights(policy, generator, names, unit_norms=("vision",))
