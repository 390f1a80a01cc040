"""GR00T N1.7: a Qwen3-VL backbone cut short, and a diffusion transformer with weights for each embodiment.

The backbone reads one chat turn: all images, then the instruction. Its features pass a norm and layers of
self-attention ("memory"), and the transformer attends to them while it denoises. Time runs as in pi0, from 1
(noise) to 0, so velocities have the opposite sign of the reference's; its time is cut into 1000 buckets.

Decisions where the reference surprises (docs/groot.md):

- Its self-attention over the features also sees the padding that a batch gives to its shorter samples, so a
  sample's result depends on its batch. `attend_padding` repeats that (the default, for the sake of equality);
  without it every sample gets the result that it has alone.
- Rows of the embodiment tables that `embodiment_rows` does not name feed nothing. They are a part of their
  own, "embodiments", and stay as they are; the reference's weight decay moves them.
- Actions after the episode's end are 0 in the noise, not the last action repeated.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlafit.nn.batch import Batch, seen_images
from vlafit.nn.flow_policy import FlowPolicy
from vlafit.nn.parameters import build_policy, draw_weights
from vlafit.nn.policy import Needs, ParameterInfo
from vlafit.nn.precision import layer_norm, matrix_dtype
from vlafit.nn.qwen3_vl import Decoder, Merger, Tower
from vlafit.policies import _groot_shapes
from vlafit.policies._common import all_true_on_cpu
from vlafit.policies._groot_config import (
    ChatConfig,
    ExpertConfig,
    LanguageConfig,
    VisionConfig,
    require_fitting,
)
from vlafit.policies._groot_head import (
    EPS,
    ActionEncoder,
    EmbodimentMLP,
    MemoryLayer,
    Rows,
    TimeEncoder,
    Transformer,
)
from vlafit.policies._groot_parts import describe
from vlafit.policies._groot_turn import Turn

BUCKETS = 1000  # of time: reference implementation
ROUNDING = 1e-4  # of a bucket: float32 times are this near, and no nearer, to the steps of a sampler


@dataclass(frozen=True)
class GrootConfig:
    """Every size of a GR00T policy."""

    vision: VisionConfig
    language: LanguageConfig
    expert: ExpertConfig
    chat: ChatConfig
    image_size: int
    """Pixels along the side of the policy's images."""
    state_dim: int
    """Padded width of the state."""
    action_dim: int
    """Padded width of an action."""
    chunk: int
    """Actions predicted at once."""
    max_tokens: int
    """Longest instruction, in tokens."""
    positions: int = 1024
    """Rows of the table of action positions, of which the first `chunk` are used."""
    embodiments: int = 32
    """Rows of the embodiment tables."""
    embodiment_rows: tuple[int, ...] = (10,)
    """Rows in use: the first for a single embodiment, else one for each number. 10: a new embodiment."""
    state_dropout: float = 0.2
    """How often a training sample's state token is zero."""
    attend_padding: bool = True
    """Whether features of padding are seen, as in the reference. False: no sample depends on its batch."""

    def __post_init__(self) -> None:
        require_fitting(self)

    @property
    def grid(self) -> int:
        """Tokens along the side of an image."""
        return self.image_size // (self.vision.patch * self.vision.merge)


TOKENIZER = "nvidia/Cosmos-Reason2-2B"
"""The tokenizer of the public checkpoints, for messages."""
_OWN_CHAT = ChatConfig(opening=(1,), image_start=1, image_end=2, closing=(2,), pad=0)
"""Of tokenizers that are trained on the spot, which know no more marks than these."""

SIZES: dict[str, GrootConfig] = {
    "groot": GrootConfig(  # GR00T N1.7: Cosmos-Reason2-2B, its first 16 text layers
        VisionConfig(width=1024, depth=24, mlp=4096, heads=16, patch=16, side=48, deepstack=(5, 11, 17)),
        LanguageConfig(
            width=2048, depth=16, mlp=6144, heads=16, kv_heads=8, head_dim=128, vocab=151936,
            sections=(24, 20, 20),
        ),
        ExpertConfig(width=1536, depth=32, heads=32, memory_depth=4, memory_heads=32, hidden=1024),
        # Qwen's <|im_start|>user\n, <|vision_start|>, <|vision_end|>, <|im_end|>\n and <|endoftext|>
        ChatConfig((151644, 872, 198), 151652, 151653, (151645, 198), 151643),
        image_size=256,
        state_dim=132,
        action_dim=132,
        chunk=40,
        max_tokens=64,
    ),
    "groot-small": GrootConfig(
        VisionConfig(width=128, depth=4, mlp=384, heads=4, patch=8, side=8, deepstack=(1, 2)),
        LanguageConfig(
            width=128, depth=4, mlp=384, heads=4, kv_heads=2, head_dim=32, vocab=512, sections=(6, 5, 5)
        ),
        ExpertConfig(
            width=96, depth=8, heads=4, memory_depth=1, memory_heads=4, hidden=96, dropout=0.0
        ),
        _OWN_CHAT, image_size=64, state_dim=8, action_dim=8, chunk=8, max_tokens=32, positions=8,
        embodiments=1, embodiment_rows=(0,), state_dropout=0.0, attend_padding=False,
    ),
    "groot-tiny": GrootConfig(
        VisionConfig(width=16, depth=2, mlp=24, heads=2, patch=4, side=3, deepstack=(0,)),
        LanguageConfig(
            width=24, depth=2, mlp=32, heads=4, kv_heads=2, head_dim=8, vocab=300, sections=(2, 1, 1)
        ),
        ExpertConfig(width=16, depth=4, heads=2, memory_depth=1, memory_heads=2, hidden=12, dropout=0.0),
        _OWN_CHAT, image_size=8, state_dim=6, action_dim=5, chunk=4, max_tokens=12, positions=6,
        embodiments=3, embodiment_rows=(1,), state_dropout=0.0, attend_padding=False,
    ),
}  # fmt: skip
"""The public size, one that two CPU cores train from scratch, and a tiny one for tests."""


@dataclass(frozen=True)
class Prefix:
    """The backbone's features `memory` [b, l, v], which of them the blocks see, and the embodiments' rows."""

    memory: Tensor
    masks: tuple[Tensor, Tensor]
    """Text, and images: each bool [b or 1, l]."""
    rows: Rows


class Stack(nn.Module):
    """Layers that the policy calls one by one."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class Groot(FlowPolicy):
    """The network. Freshly constructed, its weights are undefined: see `build`, or load a checkpoint."""

    config: GrootConfig
    steps: int | None = 4
    """Euler steps of `act`: reference implementation."""
    zero_masked_actions = True

    def __init__(self, config: GrootConfig) -> None:
        super().__init__()
        self.config = c = config
        v, lang, expert = c.vision, c.language, c.expert
        self.vision = Tower(
            v.width, v.depth, v.mlp, v.heads,
            patch=v.patch, merge=v.merge, side=v.side, image_size=c.image_size, deepstack=v.deepstack,
        )  # fmt: skip
        self.projector = Merger(v.width, lang.width, v.merge, joined=False)
        self.deepstack = Stack(Merger(v.width, lang.width, v.merge, joined=True) for _ in v.deepstack)
        self.language = Decoder(
            lang.width, lang.depth, lang.mlp, lang.heads, lang.kv_heads, lang.head_dim,
            vocab=lang.vocab, base=lang.rope_base, sections=lang.sections,
        )  # fmt: skip
        self.memory_norm = nn.LayerNorm(lang.width, eps=EPS)
        self.memory = Stack(
            MemoryLayer(lang.width, expert.memory_heads, expert.dropout) for _ in range(expert.memory_depth)
        )
        self.expert = Transformer(
            expert.width,
            expert.depth,
            expert.heads,
            lang.width,
            expert.hidden,
            expert.text_every,
            expert.dropout,
        )
        self.time_encoder = TimeEncoder(expert.width)
        self.action_position_embedding = nn.Embedding(c.positions, expert.width)
        count = c.embodiments
        self.state_encoder = EmbodimentMLP(count, c.state_dim, expert.hidden, expert.width)
        self.action_encoder = ActionEncoder(count, c.action_dim, expert.width)
        self.action_decoder = EmbodimentMLP(count, expert.hidden, expert.hidden, c.action_dim)
        chat = c.chat
        self.turn = Turn(chat.opening, chat.closing, (chat.image_start, chat.image_end), chat.pad, c.grid)

    def parts(self) -> list[ParameterInfo]:
        """Describe every parameter exactly once."""
        c = self.config
        depths = {
            "vision": c.vision.depth,
            "language": c.language.depth,
            "expert": c.expert.memory_depth + c.expert.depth,
        }
        names = [name for name, _ in self.named_parameters()]
        return [describe(name, depths, c.expert.memory_depth, c.embodiment_rows) for name in names]

    def blocks(self) -> list[nn.Module]:
        """Return the layers of the image tower, the text decoder, the memory and the transformer."""
        return [
            *self.vision.layers, *self.language.layers, *self.memory.layers, *self.expert.layers
        ]  # fmt: skip

    def needs(self) -> Needs:
        """Return what a codec for this policy must produce."""
        c = self.config
        return Needs(
            image_size=c.image_size,
            state_dim=c.state_dim,
            action_dim=c.action_dim,
            chunk=c.chunk,
            prompt="groot",
            max_tokens=c.max_tokens,
            vocabulary=c.language.vocab,
            framing="groot",
            normalisation="groot_min_max",
            embodiments=c.embodiments,
            embodiment_field="embodiment_rows",
            embodiment_rows=tuple(c.embodiment_rows),
        )

    def prefix_modules(self) -> list[nn.Module]:
        """Return the image tower, its mergers, the text decoder, and the layers over the features."""
        return [self.vision, self.projector, self.deepstack, self.language, self.memory_norm, self.memory]

    def tokens(self, batch: Batch, draws: int) -> int:
        """Count the tokens of the chat turn, and those of state and actions of every draw."""
        c = self.config
        turn = self.turn.length(batch.image_mask.shape[1], batch.prompt()[0].shape[1])
        return len(batch) * (turn + draws * (1 + c.chunk))

    def encode_prefix(self, batch: Batch, fixed: bool = False) -> Prefix:
        """Run images and instruction once. Only what a trainable part needs is kept for backward."""
        backbone = (self.vision, self.projector, self.deepstack, self.language)
        frozen = not any(p.requires_grad for module in backbone for p in module.parameters())
        training = torch.is_grad_enabled()
        with torch.set_grad_enabled(training and not frozen):
            x, valid, is_image = self._features(batch, fixed)
        own = any(p.requires_grad for module in (self.memory_norm, self.memory) for p in module.parameters())
        with torch.set_grad_enabled(training and (own or not frozen)):
            seen = valid
            if valid is not None and self.config.attend_padding:
                count = valid.sum(1, keepdim=True)
                padding = (~valid).cumsum(1) <= count.max() - count  # as many as the longest sample has more
                seen = valid | padding
            x = layer_norm(self.memory_norm, x)
            for layer in self.memory.layers:
                x = layer(x, seen)
        real = is_image.new_ones(1, len(is_image)) if valid is None else valid
        rows = Rows(self.config.embodiment_rows, batch.embodiment_id)
        return Prefix(x, (real & ~is_image, real & is_image), rows)

    def denoise(self, prefix: Prefix, state: Tensor, noisy: Tensor, time: Tensor) -> Tensor:
        """Return velocities [b, k, t, a] in float32 for `noisy` [b, k, t, a] at `time` [b, k]."""
        _, k, t, _ = noisy.shape
        bucket = ((1 - time.double()) * BUCKETS + ROUNDING).long().clamp(0, BUCKETS - 1)
        token = self.state_encoder(state, prefix.rows)[:, None, None].expand(-1, k, -1, -1)  # [b, k, 1, d]
        if self.training and self.config.state_dropout:
            kept = torch.rand(token.shape[:2], device=token.device) >= self.config.state_dropout
            token = torch.where(kept[..., None, None], token, 0.0)
        places = self.action_position_embedding(torch.arange(t, device=noisy.device))
        actions = self.action_encoder(noisy, bucket, prefix.rows) + places
        x = torch.cat((token, actions), 2).to(matrix_dtype(self.expert.layers[0]))  # [b, k, 1 + t, d]
        y = self.expert(x, self.time_encoder(bucket), prefix.memory, prefix.masks)
        return -self.action_decoder(
            y[:, :, 1:], prefix.rows
        ).float()  # the reference's time runs the other way

    def _features(self, batch: Batch, fixed: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the backbone's features [b, l, v], which are real (None: all), and which images' [l]."""
        prompt, prompt_mask = batch.prompt()
        cameras = batch.image_mask.shape[1]
        patches, kept = self.vision(seen_images(batch.images, batch.image_mask))
        dtype = self.projector.fc1.weight.dtype  # a quantised tower computes in its adapters' precision
        merged = [self.projector(patches.to(dtype))]
        merged += [merger(x.to(dtype)) for merger, x in zip(self.deepstack.layers, kept, strict=True)]
        mask = self.turn.mask(batch.image_mask, prompt_mask)
        # Leaving out an all-true mask is faster, but changes the last bits.
        valid = None if not fixed and (batch.all_real or all_true_on_cpu(mask)) else mask
        is_image = self.turn.is_image(prompt, cameras)
        real = (mask & is_image)[..., None]
        ids = torch.where(mask, self.turn.ids(prompt, cameras), self.config.chat.pad)
        words = self.language.embed_tokens(ids)  # [b, l, v]
        images, *added = (
            torch.where(real, self.turn.placed(x.to(words.dtype), cameras, ids.shape[1]), 0.0) for x in merged
        )
        positions = self.turn.positions(batch.image_mask, prompt_mask)
        return self.language(torch.where(real, images, words), positions, valid, added), valid, is_image


Config = GrootConfig
SHAPES = _groot_shapes.SHAPES


def build(
    config: GrootConfig, device: str | torch.device = "meta", generator: torch.Generator | None = None
) -> Groot:
    """Build a policy: without storage on ``"meta"``, else with fresh weights drawn from `generator`.

    Without a generator, fresh weights are those of seed 0.
    """
    return build_policy(lambda: Groot(config), init_weights, device, generator)


def init_weights(policy: Groot, generator: torch.Generator, names: Sequence[str] | None = None) -> list[str]:
    """Draw fresh weights for `names` (None: all) and return their names; see `nn.parameters.draw_weights`.

    Adaptive norms start closed (zero).
    """
    drawn = draw_weights(policy, generator, names, unit_norms=("vision", "projector", "language"))
    with torch.no_grad():
        for name in drawn:
            if name.startswith("memory") and "norm" in name and name.endswith(".weight"):
                policy.get_parameter(name).fill_(1.0)
    return drawn


def init_embodiment(policy: Groot, number: int, generator: torch.Generator) -> list[str]:
    """Draw row `number` of the tables of embodiments anew; return the names of its layers."""
    return init_weights(policy, generator, [f"*coder.*.layers.{number}.*"])
