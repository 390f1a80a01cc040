"""Tables that say how a family's config shows in the shapes of its tensors.

A family that other programs save declares one as `SHAPES`; `vlafit.checkpoints.infer` reads it. A family
without one is saved and loaded in vlafit's own format only, where the config is written down.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

GUESS = 2
"""Stands for a size that nothing tells until the missing tensors are named."""


@dataclass(frozen=True)
class Sizes:
    """The sizes that are known while a config is inferred, for the rules of `Derived`.

    `voted(dimension)` is the size that most tensors have, None where no tensor has that dimension;
    `stated(key)` lists what config files say of a config key; `read` holds the sizes inferred so far, nested.
    `shapes` are those of the tensors, by our names.
    """

    shapes: Mapping[str, Sequence[int]]
    voted: Callable[[str], int | None]
    stated: Callable[[str], list[int]]
    read: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        """Return the size inferred for a dotted config key; None where there is none yet."""
        value: Any = self.read
        for piece in key.split("."):
            value = value.get(piece) if isinstance(value, Mapping) else None
        return value


@dataclass(frozen=True)
class Derived:
    """A config key that is computed from dimensions, such as an image's side from its number of patches."""

    key: str
    compute: Callable[[Sizes], int | None]
    """None: it cannot be known from what there is."""
    dimension: str = ""
    """The dimension that it is computed from; an error names a tensor that has it."""
    user_first: bool = False
    """Whether the user's or config file's value replaces the computed one before other keys are derived."""
    guess: Callable[[Sizes], int] | None = None
    """A stand-in where it cannot be known; the key is then named as unknown."""


@dataclass(frozen=True)
class Constant:
    """A size that the programs that save this family have written into their code."""

    key: str
    value: int
    source: str
    when: Mapping[str, int] = field(default_factory=dict)
    """It holds where these keys have these sizes."""
    unless: str = ""
    """It does not hold where the user or a config file gives this key."""


@dataclass(frozen=True)
class Variant:
    """One model of a family; `label` names it in messages, `public` and `tiny` in the family's SIZES."""

    label: str
    public: str
    tiny: str
    """A small size, built to name the parameters where the file's own sizes do not go together."""
    only: frozenset[str] = frozenset()
    """Patterns of tensors that no other variant has."""
    values: Mapping[str, object] = field(default_factory=dict)
    """Config values that this variant fixes."""
    padded_as: Mapping[str, str] = field(default_factory=dict)
    """Widths that no tensor of this variant has -> the width that they are padded to."""


@dataclass(frozen=True)
class ShapeTable:
    """How each config key shows in the tensors of a family.

    `axes` has, for each parameter name (a layer's number is ``*``), the dimensions of its axes in words, such
    as ``2*expert.width expert.width``. A dimension named like a config key is that key; other names are used
    by `derived`. A number is no dimension; ``-`` tells nothing.
    """

    axes: Mapping[str, str]
    keys: tuple[str, ...]
    """Config keys read directly from axes, in the order in which they are read."""
    depths: Mapping[str, tuple[str, ...]]
    """Config key of a depth -> the stacks of layers that are this deep."""
    variants: tuple[Variant, ...]
    derived: tuple[Derived, ...] = ()
    """In order: later rules may use earlier keys."""
    constants: tuple[Constant, ...] = ()
    public_if: Mapping[str, str] = field(default_factory=dict)
    """Section of the config -> the width that makes the public size's section the expected one."""
    assumed_if: tuple[str, ...] = ()
    """Widths that must all be the public size's before `assumed` is taken from it."""
    assumed: tuple[str, ...] = ()
    """Config keys that no tensor tells, taken from the public size of the same widths."""
    stand_ins: Mapping[str, Callable[[Sizes], Any]] = field(default_factory=dict)
    """Config keys that the user must give where nothing tells them -> a value to compare tensors with."""


def linear_axes(name: str, rows: str, columns: str) -> dict[str, str]:
    """Return the axes of a linear layer with a bias."""
    return {f"{name}.weight": f"{rows} {columns}", f"{name}.bias": rows}


def tower_axes() -> dict[str, str]:
    """Return the axes of the SigLIP image tower; `patches` counts those of an image."""
    w, mlp = "vision.width", "vision.mlp"
    axes = {
        "vision.patch_embedding.weight": f"{w} 3 vision.patch vision.patch",
        "vision.patch_embedding.bias": w,
        "vision.position_embedding.weight": f"patches {w}",
    }
    for norm in ("layers.*.layer_norm1", "layers.*.layer_norm2", "post_layernorm"):
        axes |= {f"vision.{norm}.{leaf}": w for leaf in ("weight", "bias")}
    for leaf in ("q_proj", "k_proj", "v_proj", "out_proj"):
        axes |= linear_axes(f"vision.layers.*.self_attn.{leaf}", w, w)
    fc1 = linear_axes("vision.layers.*.mlp.fc1", mlp, w)
    return axes | fc1 | linear_axes("vision.layers.*.mlp.fc2", w, mlp)


LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")


def decoder_axes(part: str) -> dict[str, str]:
    """Return the axes of the decoder `part` but for adaptive norms; `queries`, `keys`: rows of all heads."""
    w, mlp = f"{part}.width", f"{part}.mlp"
    attention, layers = f"{part}.layers.*.self_attn", f"{part}.layers.*"
    return {
        f"{attention}.q_proj.weight": f"queries {w}",
        f"{attention}.k_proj.weight": f"keys {w}",
        f"{attention}.v_proj.weight": f"keys {w}",
        f"{attention}.o_proj.weight": f"{w} queries",
        f"{layers}.mlp.gate_proj.weight": f"{mlp} {w}",
        f"{layers}.mlp.up_proj.weight": f"{mlp} {w}",
        f"{layers}.mlp.down_proj.weight": f"{w} {mlp}",
        **{f"{layers}.{norm}.weight": w for norm in LAYER_NORMS},
        f"{part}.norm.weight": w,
    }


EMBEDDING_AXES = {"language.embed_tokens.weight": "language.vocab language.width"}


def action_axes(state_width: str) -> dict[str, str]:
    """Return the axes of the projections; the state is projected to `state_width`."""
    w = "expert.width"
    return {
        **linear_axes("state_proj", state_width, "state_dim"),
        **linear_axes("action_in_proj", w, "action_dim"),
        **linear_axes("action_out_proj", "action_dim", w),
        **linear_axes("action_time_mlp_in", w, f"2*{w}"),
        **linear_axes("action_time_mlp_out", w, w),
    }


VLA_KEYS = (
    "vision.width",
    "vision.mlp",
    "vision.patch",
    "state_dim",
    "action_dim",
    "language.width",
    "language.mlp",
    "language.vocab",
    "expert.width",
    "expert.mlp",
)
"""Keys that tensors of a tower, a decoder, an expert and the projections between them tell."""
VLA_DEPTHS = {"vision.depth": ("vision",), "language.depth": ("language", "expert")}


def image_size(sizes: Sizes) -> int | None:
    """Return the side of an image from its number of patches, else what is stated."""
    patches, stated = sizes.voted("patches"), sizes.stated("vision.image_size")
    if patches is not None:
        return math.isqrt(patches) * sizes["vision.patch"]
    return stated[0] if stated else None


def heads(key: str, rows: str) -> Derived:
    """Return the rule for a number of heads: the rows of all heads over those of one."""

    def compute(sizes: Sizes) -> int | None:
        size, head_dim, stated = sizes.voted(rows), sizes["language.head_dim"], sizes.stated(key)
        if head_dim is None:
            return None
        return (stated[0] if stated else 1) if size is None else size // head_dim

    return Derived(key, compute, rows)


VLA_IMAGE = Derived("vision.image_size", image_size, "patches", guess=lambda sizes: sizes["vision.patch"])
VLA_HEADS = (heads("language.heads", "queries"), heads("language.kv_heads", "keys"))
