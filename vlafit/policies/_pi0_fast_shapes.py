"""How the config of pi0-FAST shows in the shapes of its tensors."""

from vlafit.nn.shape_table import (
    EMBEDDING_AXES,
    GUESS,
    VLA_HEADS,
    VLA_IMAGE,
    Constant,
    Derived,
    ShapeTable,
    Sizes,
    Variant,
    decoder_axes,
    linear_axes,
    tower_axes,
)
from vlafit.policies._pi0_shapes import HEADS, IMAGE_SIZE, KV_HEADS, PATCH

AXES: dict[str, str] = {
    **tower_axes(),
    **linear_axes("projector", "language.width", "vision.width"),
    **EMBEDDING_AXES,
    **decoder_axes("language"),
    "lm_head.weight": "language.vocab language.width",
}


def _head_dim(sizes: Sizes) -> int:
    return (sizes.voted("keys") or GUESS) // KV_HEADS


SHAPES = ShapeTable(
    axes=AXES,
    keys=(
        "vision.width",
        "vision.mlp",
        "vision.patch",
        "language.width",
        "language.mlp",
        "language.vocab",
    ),
    depths={"vision.depth": ("vision",), "language.depth": ("language",)},
    variants=(
        Variant(
            "pi0-FAST",
            public="pi0-fast",
            tiny="pi0-fast-tiny",
            values={"state_dim": 32, "action_dim": 32},  # room that no tensor has: reference implementation
        ),
    ),
    derived=(VLA_IMAGE, Derived("language.head_dim", _head_dim, user_first=True), *VLA_HEADS),
    constants=(
        Constant(
            "vision.image_size",
            IMAGE_SIZE,
            f"every known pi0-FAST checkpoint (patches of {PATCH})",
            {"vision.patch": PATCH},
            unless="vision.image_size",
        ),
        Constant(
            "language.heads",
            HEADS,
            "every known pi0-FAST checkpoint, with one head of keys",
            unless="language.head_dim",
        ),
    ),
    public_if={"vision": "vision.width", "language": "language.width"},
    assumed_if=("vision.width", "language.width"),
    assumed=("chunk", "vision.heads", "max_tokens", "action_tokens"),
    stand_ins={key: lambda sizes: 1 for key in ("vision.heads", "chunk", "max_tokens", "action_tokens")},
)
