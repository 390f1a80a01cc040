"""How the config of GR00T shows in the shapes of its tensors."""

import math

from vlafit.nn.shape_table import Derived, ShapeTable, Sizes, Variant, decoder_axes, heads, linear_axes

_V, _L, _E, _H = "vision.width", "language.width", "expert.width", "expert.hidden"
PIXEL_VALUES = 6  # of a patch, for each of its pixels: three channels of two frames


def _norms(width: str, *names: str) -> dict[str, str]:
    return {f"{name}.{leaf}": width for name in names for leaf in ("weight", "bias")}


def _attention(name: str, width: str, keys: str) -> dict[str, str]:
    axes = linear_axes(f"{name}.q_proj", width, width) | linear_axes(f"{name}.out_proj", width, width)
    return axes | linear_axes(f"{name}.k_proj", width, keys) | linear_axes(f"{name}.v_proj", width, keys)


def _mlp(name: str, width: str) -> dict[str, str]:
    return linear_axes(f"{name}.fc1", f"4*{width}", width) | linear_axes(f"{name}.fc2", width, f"4*{width}")


def _merger(name: str, normed: str) -> dict[str, str]:
    axes = _norms(normed, f"{name}.norm") | linear_axes(f"{name}.fc1", "folded", "folded")
    return axes | linear_axes(f"{name}.fc2", _L, "folded")


AXES: dict[str, str] = {
    **linear_axes("vision.patch_embedding", _V, "pixels"),
    "vision.position_embedding.weight": f"places {_V}",
    **_norms(_V, "vision.layers.*.norm1", "vision.layers.*.norm2"),
    **linear_axes("vision.layers.*.self_attn.qkv", f"3*{_V}", _V),
    **linear_axes("vision.layers.*.self_attn.out_proj", _V, _V),
    **linear_axes("vision.layers.*.mlp.fc1", "vision.mlp", _V),
    **linear_axes("vision.layers.*.mlp.fc2", _V, "vision.mlp"),
    **_merger("projector", _V),
    **_merger("deepstack.layers.*", "folded"),
    "language.embed_tokens.weight": f"language.vocab {_L}",
    **decoder_axes("language"),
    **{f"language.layers.*.self_attn.{norm}.weight": "language.head_dim" for norm in ("q_norm", "k_norm")},
    **_norms(_L, "memory_norm", "memory.layers.*.norm1", "memory.layers.*.norm2"),
    **_attention("memory.layers.*.attn", _L, _L),
    **_mlp("memory.layers.*.mlp", _L),
    **linear_axes("expert.layers.*.norm.dense", f"2*{_E}", _E),
    **_attention(
        "expert.layers.*.attn", _E, "-"
    ),  # the features in even blocks, their own tokens in odd ones
    **_mlp("expert.layers.*.mlp", _E),
    **linear_axes("expert.last_norm", f"2*{_E}", _E),
    **linear_axes("expert.out_proj", _H, _E),
    **linear_axes("time_encoder.fc1", _E, "256"),
    **linear_axes("time_encoder.fc2", _E, _E),
    "action_position_embedding.weight": f"positions {_E}",
    **linear_axes("state_encoder.first.layers.*", _H, "state_dim"),
    **linear_axes("state_encoder.second.layers.*", _E, _H),
    **linear_axes("action_encoder.first.layers.*", _E, "action_dim"),
    **linear_axes("action_encoder.second.layers.*", _E, f"2*{_E}"),
    **linear_axes("action_encoder.third.layers.*", _E, _E),
    **linear_axes("action_decoder.first.layers.*", _H, _H),
    **linear_axes("action_decoder.second.layers.*", "action_dim", _H),
}

PROJECTORS = (
    "state_encoder.first",
    "state_encoder.second",
    "action_encoder.first",
    "action_encoder.second",
    "action_encoder.third",
    "action_decoder.first",
    "action_decoder.second",
)
"""The layers that have weights for each embodiment."""


def _patch(sizes: Sizes) -> int | None:
    pixels, stated = sizes.voted("pixels"), sizes.stated("vision.patch")
    return _first(stated) if pixels is None else math.isqrt(pixels // PIXEL_VALUES)


def _side(sizes: Sizes) -> int | None:
    places, stated = sizes.voted("places"), sizes.stated("vision.side")
    return _first(stated) if places is None else math.isqrt(places)


def _merge(sizes: Sizes) -> int | None:
    folded, stated = sizes.voted("folded"), sizes.stated("vision.merge")
    return _first(stated) if folded is None else max(1, math.isqrt(folded // sizes["vision.width"]))


def _deepstack(sizes: Sizes) -> int:
    """Count the mergers of features from inside the tower."""
    return len({name.split(".")[2] for name in sizes.shapes if name.startswith("deepstack.layers.")})


def _first(stated: list[int]) -> int | None:
    return stated[0] if stated else None


SHAPES = ShapeTable(
    axes=AXES,
    keys=(
        "vision.width",
        "vision.mlp",
        "language.width",
        "language.mlp",
        "language.vocab",
        "language.head_dim",
        "expert.width",
        "expert.hidden",
        "state_dim",
        "action_dim",
        "positions",
    ),
    depths={
        "vision.depth": ("vision",),
        "language.depth": ("language",),
        "expert.depth": ("expert",),
        "expert.memory_depth": ("memory",),
        "embodiments": PROJECTORS,
    },
    variants=(Variant("GR00T", public="groot", tiny="groot-tiny"),),
    derived=(
        Derived("vision.patch", _patch, "pixels", guess=lambda sizes: 1),
        Derived("vision.side", _side, "places", guess=lambda sizes: 1),
        Derived("vision.merge", _merge, "folded", guess=lambda sizes: 1),
        heads("language.heads", "queries"),
        heads("language.kv_heads", "keys"),
    ),
    public_if={"vision": "vision.width", "language": "language.width", "expert": "expert.width"},
    assumed_if=("vision.width", "language.width", "expert.width"),
    assumed=(
        "vision.heads",
        "vision.deepstack",
        "language.sections",
        "expert.heads",
        "expert.memory_heads",
        "chat",
        "image_size",
        "chunk",
        "max_tokens",
    ),
    stand_ins={
        "vision.heads": lambda sizes: 1,
        "vision.deepstack": lambda sizes: tuple(range(_deepstack(sizes))),
        "language.sections": lambda sizes: (sizes["language.head_dim"] // 2, 0, 0),
        "expert.heads": lambda sizes: 1,
        "expert.memory_heads": lambda sizes: 1,
        "chat": lambda sizes: {"opening": (), "closing": (), "image_start": 0, "image_end": 0, "pad": 0},
        "image_size": lambda sizes: sizes["vision.patch"] * sizes["vision.merge"],
        "chunk": lambda sizes: 1,
        "max_tokens": lambda sizes: 1,
    },
)
