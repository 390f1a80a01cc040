"""How the config of SmolVLA shows in the shapes of its tensors."""

import math

from vlafit.nn.shape_table import (
    EMBEDDING_AXES,
    VLA_DEPTHS,
    VLA_HEADS,
    VLA_IMAGE,
    VLA_KEYS,
    Derived,
    ShapeTable,
    Sizes,
    Variant,
    action_axes,
    decoder_axes,
    tower_axes,
)

HEAD_DIM = {576: 64, 960: 64, 2048: 64}  # SmolLM2 135M, 360M and 1.7B by width: the decoders of SmolVLM2
TOWER_HEADS = {768: 12, 1152: 16}  # SigLIP B/16 and So400m/14, by width: the towers of SmolVLM2

AXES: dict[str, str] = {
    **tower_axes(),
    "projector.proj.weight": "language.width folded",
    **EMBEDDING_AXES,
    **decoder_axes("language"),
    **decoder_axes("expert"),
    # Cross layers make their keys of the prefix's keys, self layers of the expert's tokens.
    "expert.layers.*.self_attn.k_proj.weight": "keys -",
    "expert.layers.*.self_attn.v_proj.weight": "keys -",
    **action_axes("language.width"),
}


def _shuffle(sizes: Sizes) -> int:
    folded, stated = sizes.voted("folded"), sizes.stated("vision.shuffle")
    if folded is None:
        return (stated[0] if stated else 0) or 1
    return max(1, math.isqrt(folded // sizes["vision.width"]))


def _self_every(sizes: Sizes) -> int | None:
    """Tell self from cross layers by what their keys are made of: the expert's tokens, or prefix keys.

    The rhythm that most layers agree with wins; None where both are equally wide and nothing states it.
    """
    depth, width, stated = sizes["language.depth"], sizes["expert.width"], sizes.stated("expert.self_every")
    columns = {
        layer: shape[1]
        for layer in range(depth)
        for leaf in ("k_proj", "v_proj")
        if len(shape := sizes.shapes.get(f"expert.layers.{layer}.self_attn.{leaf}.weight", ())) == 2
    }
    if width == sizes.voted("keys"):
        return stated[0] if stated else None

    def agreeing(every: int) -> tuple[int, bool]:
        is_self = {layer: every > 0 and layer % every == 0 for layer in columns}
        return sum((size == width) == is_self[layer] for layer, size in columns.items()), every in stated

    return max(range(depth + 1), key=agreeing)


SHAPES = ShapeTable(
    axes=AXES,
    keys=VLA_KEYS,
    depths=VLA_DEPTHS,
    variants=(Variant("SmolVLA", public="smolvla", tiny="smolvla-tiny"),),
    derived=(
        VLA_IMAGE,
        Derived("vision.heads", lambda sizes: TOWER_HEADS.get(sizes["vision.width"])),
        Derived("vision.shuffle", _shuffle),
        Derived("language.head_dim", lambda sizes: HEAD_DIM.get(sizes["language.width"]), user_first=True),
        Derived("expert.self_every", _self_every),
        *VLA_HEADS,
    ),
    public_if={"vision": "language.width", "language": "language.width"},
    assumed_if=("language.width",),
    assumed=("image_size", "chunk", "max_tokens"),
    stand_ins={
        "vision.heads": lambda sizes: 1,
        "language.head_dim": lambda sizes: 2,
        "expert.self_every": lambda sizes: 1,
        "image_size": lambda sizes: sizes["vision.patch"] * sizes["vision.shuffle"],
        "chunk": lambda sizes: 1,
        "max_tokens": lambda sizes: 1,
    },
)
