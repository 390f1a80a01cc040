"""Every size of an OpenVLA policy, and the public ones by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vlafit.codec.action_bins import BINS
from vlafit.nn.prismatic import TowerSizes
from vlafit.policies._common import multiple, require, require_positive

Head = Literal["tokens", "parallel_tokens", "l1", "diffusion"]
TOKEN_HEADS: tuple[Head, ...] = ("tokens", "parallel_tokens")


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


NO_EXPERT = ExpertConfig(0, 0)
"""Of a policy that writes actions as tokens."""


@dataclass(frozen=True)
class OpenVLASizes:
    """Every size of an OpenVLA policy; the family's config is a class of its own module."""

    vision: VisionConfig
    language: LanguageConfig
    expert: ExpertConfig
    """Zeros where actions are tokens."""
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
    head: Head = "l1"
    """How actions are written. tokens: as tokens, one after the other, each from those before it (OpenVLA).
    The others write all in one pass in which every token sees every other (OpenVLA-OFT): parallel_tokens as
    tokens, l1 as numbers, diffusion as noise that is taken away in steps."""
    text_vocab: int = 32_000
    """Tokens of the tokenizer, Llama's: actions are its last 256, and what the vocabulary has beyond pads."""

    answer_tokens: int = 0
    """Longest answer to a question about images that is learned beside actions, in tokens, its end included;
    0: at most as long as the tokens of a chunk. Only with the head "tokens"."""

    @property
    def writes_tokens(self) -> bool:
        """Whether actions are tokens of the vocabulary."""
        return self.head in TOKEN_HEADS

    def __post_init__(self) -> None:
        v, lang = self.vision, self.language
        sections = {"": self, "language.": lang, "vision.dino.": v.dino, "vision.siglip.": v.siglip}
        sections = sections if self.writes_tokens else sections | {"expert.": self.expert}
        require_positive(sections, zero=("answer_tokens",))
        require(
            (
                not self.writes_tokens or self.expert == NO_EXPERT,
                f"expert.width is {self.expert.width} and expert.blocks {self.expert.blocks}; with the head "
                f"{self.head!r} actions are tokens, and both must be 0",
            ),
            (
                not self.writes_tokens or BINS < self.text_vocab <= lang.vocab,
                f"text_vocab is {self.text_vocab}; its last {BINS} tokens are actions, so it must be more, "
                f"and at most language.vocab, {lang.vocab}",
            ),
            (
                not self.answer_tokens or self.head == "tokens",
                f'answer_tokens is {self.answer_tokens}; only the head "tokens" writes answers, word after '
                f"word; with {self.head!r} it must be 0",
            ),
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


_VISION = VisionConfig(  # timm's vit_large_patch14_reg4_dinov2 and vit_so400m_patch14_siglip_224
    TowerSizes(1024, 24, 4096, 16), TowerSizes(1152, 27, 4304, 16), patch=14, image_size=224
)
_LLAMA = LanguageConfig(width=4096, depth=32, mlp=11008, heads=32, kv_heads=32, vocab=32064)  # Llama 2
_SMALL = VisionConfig(TowerSizes(96, 4, 256, 4), TowerSizes(96, 4, 256, 4), patch=16, image_size=64)
_TINY = VisionConfig(TowerSizes(16, 3, 24, 2), TowerSizes(24, 3, 40, 2), patch=4, image_size=8, registers=2)

PUBLIC: Mapping[str, OpenVLASizes] = {
    "openvla-oft": OpenVLASizes(
        _VISION, _LLAMA, ExpertConfig(width=4096), state_dim=8, action_dim=7, chunk=8, max_tokens=96
    ),
    "openvla-oft-small": OpenVLASizes(
        _SMALL,
        LanguageConfig(width=128, depth=4, mlp=384, heads=4, kv_heads=4, vocab=512),
        ExpertConfig(width=128),
        state_dim=8, action_dim=8, chunk=8, max_tokens=64,
    ),
    "openvla-oft-tiny": OpenVLASizes(
        _TINY,
        LanguageConfig(width=32, depth=2, mlp=48, heads=4, kv_heads=4, vocab=300),
        ExpertConfig(width=16),
        state_dim=6, action_dim=5, chunk=4, max_tokens=48, film=True,
    ),
    "openvla": OpenVLASizes(
        _VISION, _LLAMA, NO_EXPERT, state_dim=8, action_dim=7, chunk=1, max_tokens=96, proprio=False,
        head="tokens",
    ),
    "openvla-small": OpenVLASizes(
        _SMALL,
        LanguageConfig(width=128, depth=4, mlp=384, heads=4, kv_heads=4, vocab=1024),
        NO_EXPERT,
        state_dim=8, action_dim=8, chunk=1, max_tokens=64, proprio=False, head="tokens", text_vocab=1024,
    ),
    "openvla-tiny": OpenVLASizes(
        _TINY,
        LanguageConfig(width=32, depth=2, mlp=48, heads=4, kv_heads=4, vocab=576),
        NO_EXPERT,
        state_dim=6, action_dim=5, chunk=2, max_tokens=48, proprio=False, head="tokens", text_vocab=560,
    ),
}  # fmt: skip
"""The public sizes (OFT's with two cameras and LIBERO's chunk), small ones that two CPU cores train, and tiny
ones for tests."""
