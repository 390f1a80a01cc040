"""X-VLA's config: the sizes of its parts, and whether they go together."""

from dataclasses import dataclass
from typing import Any

from vlafit.nn.florence2 import stage_side
from vlafit.policies._common import multiple, require, require_positive
from vlafit.policies._xvla_spaces import space_of


@dataclass(frozen=True)
class VisionConfig:
    """The DaViT image tower and the projector; tuples have an entry for each stage."""

    stage_width: tuple[int, ...]
    stage_blocks: tuple[int, ...]
    """Pairs of a spatial and a channel block."""
    stage_heads: tuple[int, ...]
    stage_groups: tuple[int, ...]
    """Groups of channels, each of which attends in itself."""
    window: int
    """Pixels along the side of an attention window."""
    positions: int
    """Rows, and columns, of features that the projector has positions for."""
    frames: int
    """Rows of the projector's constant table of times, of which only the first is read."""
    kernel: tuple[int, ...] = (7, 3, 3, 3)
    stride: tuple[int, ...] = (4, 2, 2, 2)
    padding: tuple[int, ...] = (3, 1, 1, 1)
    norm_first: tuple[bool, ...] = (False, True, True, True)
    """Whether a stage's first norm is before its convolution."""
    drop_path: float = 0.1


@dataclass(frozen=True)
class LanguageConfig:
    """BART's encoder."""

    width: int
    depth: int
    mlp: int
    heads: int
    vocab: int
    positions: int
    """Tokens of image and text together that it has positions for."""
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.1


@dataclass(frozen=True)
class ExpertConfig:
    """The transformer that predicts actions."""

    width: int
    depth: int
    mlp: int
    heads: int
    time_dim: int
    """Width of the embedded time."""
    positions: int
    """Tokens of actions, images and text together that it has positions for."""
    dropout: float = 0.1


def require_fitting(config: Any) -> None:
    """Raise ConfigError naming a size that is impossible or does not go with the others."""
    lang = config.language
    require_positive({"vision.": config.vision, "language.": lang, "expert.": config.expert})
    for name in ("image_size", "views", "state_dim", "action_dim", "chunk", "max_tokens", "domains"):
        value = getattr(config, name)
        require((value >= 1, f"{name} is {value}; it must be at least 1"))
    for name, most in (
        ("real_dim", config.action_dim),
        ("domain", config.domains - 1),
        ("pad_token", lang.vocab - 1),
    ):
        value = getattr(config, name)
        require((0 <= value <= most, f"{name} is {value}; it must be at least 0 and at most {most}"))
    require((config.prompts >= 0, f"prompts is {config.prompts}; it must be at least 0"))
    _require_stages(config.vision)
    _require_parts(config)


def _require_stages(v: VisionConfig) -> None:
    """Raise ConfigError where the stages of the tower do not go together."""
    stages = len(v.stage_width)
    for name in ("stage_blocks", "stage_heads", "stage_groups", "kernel", "stride", "padding", "norm_first"):
        value = getattr(v, name)
        require(
            (
                len(value) == stages > 0,
                f"vision.{name} has {len(value)} entries, vision.stage_width {stages}; each stage needs one",
            )
        )
    for name in ("stage_width", "stage_blocks", "stage_heads", "stage_groups", "kernel", "stride"):
        value = getattr(v, name)
        require((min(value) >= 1, f"vision.{name} is {value}; every entry must be at least 1"))
    for name in ("stage_heads", "stage_groups"):
        for width, parts in zip(v.stage_width, getattr(v, name), strict=True):
            require(multiple("vision.stage_width", width, f"vision.{name}", parts))
    require((0 <= v.drop_path < 1, f"vision.drop_path is {v.drop_path}; it must be at least 0 and below 1"))


def _require_parts(config: Any) -> None:
    """Raise ConfigError where the parts do not go together."""
    v, lang, expert = config.vision, config.language, config.expert
    for where, part in (("language", lang), ("expert", expert)):
        require(
            multiple(f"{where}.width", part.width, f"{where}.heads", part.heads),
        )
        for name in (name for name in vars(part) if name.endswith("dropout")):
            rate = getattr(part, name)
            require((0 <= rate < 1, f"{where}.{name} is {rate}; it must be at least 0 and below 1"))
    side = stage_side(config.image_size, v.kernel, v.stride, v.padding)
    tokens = side * side + 1
    read, length = tokens + config.max_tokens, config.chunk + tokens * config.views + config.max_tokens
    space = space_of(config.action_space, config.action_dim, config.real_dim)
    require(
        (side >= 1, f"image_size {config.image_size} is too small for the stages of vision.stride"),
        (
            side <= v.positions,
            f"image_size {config.image_size} gives {side} rows of features; vision.positions has room for at "
            f"most {v.positions}",
        ),
        (
            read <= lang.positions,
            f"max_tokens {config.max_tokens} and the {tokens} tokens of an image are {read}; "
            f"language.positions has room for at most {lang.positions}",
        ),
        (
            length <= expert.positions,
            f"chunk {config.chunk}, views {config.views} of {tokens} tokens each and max_tokens "
            f"{config.max_tokens} are {length} tokens; expert.positions has room for at most "
            f"{expert.positions}",
        ),
        (
            space.width in (0, config.action_dim),
            f"action_dim is {config.action_dim}; actions of action_space {config.action_space!r} have at "
            f"least and at most {space.width} dimensions",
        ),
        (
            all(channel < config.state_dim for channel in space.grippers),
            f"state_dim is {config.state_dim}; action_space {config.action_space!r} hides the dimensions "
            f"{space.grippers} of the state",
        ),
        (
            config.real_dim == 0 or config.action_space == "auto",
            f"real_dim is for action_space 'auto', not {config.action_space!r}; leave it out",
        ),
    )
