"""GR00T's config: the sizes of its parts, and whether they go together."""

from dataclasses import dataclass
from typing import Any

from vlafit.policies._common import multiple, require, require_positive

LARGEST_SIDE, MOST_EMBODIMENTS, MOST_POSITIONS = 4096, 1024, 2**20


@dataclass(frozen=True)
class VisionConfig:
    """The image tower, and the mergers behind it."""

    width: int
    depth: int
    mlp: int
    heads: int
    patch: int
    """Pixels along a patch's side."""
    side: int
    """Rows of the square table of learned positions, which is interpolated to the grid of patches."""
    deepstack: tuple[int, ...]
    """Layers whose features the decoder's first layers add, the first of them to the first."""
    merge: int = 2
    """This many patches by this many become one token."""


@dataclass(frozen=True)
class LanguageConfig:
    """The text decoder; `depth` counts the layers that are left."""

    width: int
    depth: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    sections: tuple[int, int, int]
    """Rotary frequencies of time, row and column."""
    rope_base: float = 5_000_000.0


@dataclass(frozen=True)
class ExpertConfig:
    """The layers over the backbone's features, and the diffusion transformer."""

    width: int
    depth: int
    heads: int
    memory_depth: int
    memory_heads: int
    hidden: int
    """Width of the transformer's output, and inside the state's encoder and the actions' decoder."""
    text_every: int = 2
    """Of the blocks that attend to the features, every one whose number this divides sees the text, the
    others the images."""
    dropout: float = 0.2


@dataclass(frozen=True)
class ChatConfig:
    """Token ids around images and instruction; the instruction's own tokens come from the codec."""

    opening: tuple[int, ...]
    image_start: int
    image_end: int
    closing: tuple[int, ...]
    pad: int


def require_fitting(config: Any) -> None:
    """Raise ConfigError naming a size that is impossible or does not go with the others."""
    v, lang, expert = config.vision, config.language, config.expert
    require_positive({"": config, "vision.": v, "language.": lang, "expert.": expert})
    fold = v.patch * v.merge
    tokens = {f"chat.{key}": value for key, value in vars(config.chat).items()}
    tokens = {key: value if isinstance(value, tuple) else (value,) for key, value in tokens.items()}
    most = {
        "vision.side": (v.side, LARGEST_SIDE),
        "embodiments": (config.embodiments, MOST_EMBODIMENTS),
        "positions": (config.positions, MOST_POSITIONS),
        "chunk": (config.chunk, config.positions),
        "expert.text_every": (expert.text_every, expert.depth),
        **{key: (max(ids, default=0), lang.vocab - 1) for key, ids in tokens.items()},
    }
    require(*(
        (value <= limit, f"{key} is {value}; at most {limit} is supported here")
        for key, (value, limit) in most.items()
    ))  # fmt: skip
    require(
        (
            config.image_size % fold == 0,
            f"image_size {config.image_size} is not a multiple of vision.patch times vision.merge, {fold}",
        ),
        multiple("vision.width", v.width, "vision.heads", v.heads),
        (
            v.width // v.heads % 4 == 0,
            f"vision.width / vision.heads is {v.width // v.heads}; rows and columns need pairs of it",
        ),
        (
            all(0 <= i < v.depth for i in v.deepstack) and list(v.deepstack) == sorted({*v.deepstack}),
            f"vision.deepstack {v.deepstack} are no ascending layers of {v.depth}",
        ),
        (
            len(v.deepstack) < lang.depth,
            f"language.depth {lang.depth} must be more than the {len(v.deepstack)} layers that "
            "vision.deepstack is added to",
        ),
        multiple("language.heads", lang.heads, "language.kv_heads", lang.kv_heads),
        (lang.head_dim % 2 == 0, f"language.head_dim {lang.head_dim} is odd; rotation needs pairs"),
        (
            2 * sum(lang.sections) == lang.head_dim and min(lang.sections) >= 0,
            f"language.head_dim is {lang.head_dim}; language.sections {lang.sections} place at most "
            f"{2 * sum(lang.sections)} of its dimensions, and must place all",
        ),
        (
            expert.width % expert.heads == 0 and expert.width % 2 == 0,
            f"expert.width {expert.width} is odd, or no multiple of expert.heads {expert.heads}",
        ),
        multiple("language.width", lang.width, "expert.memory_heads", expert.memory_heads),
        (0 <= expert.dropout < 1, f"expert.dropout is {expert.dropout}; it must be 0 to below 1"),
        (0 <= config.state_dropout < 1, f"state_dropout is {config.state_dropout}; it must be 0 to below 1"),
        (
            min(min(ids, default=0) for ids in tokens.values()) >= 0,
            f"chat {config.chat} names a token below 0",
        ),
        (
            len({*config.embodiment_rows}) == len(config.embodiment_rows) > 0
            and all(0 <= row < config.embodiments for row in config.embodiment_rows),
            f"embodiment_rows {list(config.embodiment_rows)} must be different rows from 0 to "
            f"{config.embodiments - 1}, at least one",
        ),
    )
