"""How the configs of pi0 and pi0.5 show in the shapes of their tensors."""

from vlafit.nn.shape_table import (
    EMBEDDING_AXES,
    GUESS,
    LAYER_NORMS,
    VLA_DEPTHS,
    VLA_HEADS,
    VLA_IMAGE,
    VLA_KEYS,
    Constant,
    Derived,
    ShapeTable,
    Sizes,
    Variant,
    action_axes,
    decoder_axes,
    linear_axes,
    tower_axes,
)

KV_HEADS = (
    1  # openpi and LeRobot have no other number, so the keys' rows are one head: reference implementation
)
HEADS = 8  # of openpi and LeRobot, both of which write the number into their code: reference implementation
IMAGE_SIZE, PATCH = 224, 14  # openpi and LeRobot know patches of 14 only in images of 224

_ADAPTIVE = {
    f"expert.{norm}.dense.{leaf}": words
    for norm in (*(f"layers.*.{n}" for n in LAYER_NORMS), "norm")
    for leaf, words in (("weight", "3*expert.width expert.width"), ("bias", "3*expert.width"))
}
AXES: dict[str, str] = {
    **tower_axes(),
    **linear_axes("projector", "language.width", "vision.width"),
    **EMBEDDING_AXES,
    **decoder_axes("language"),
    **decoder_axes("expert"),
    **_ADAPTIVE,
    **action_axes("expert.width"),
    **linear_axes("time_mlp_in", "expert.width", "expert.width"),
    **linear_axes("time_mlp_out", "expert.width", "expert.width"),
}

_ONLY_PI05 = {*_ADAPTIVE, *(name for name in AXES if name.startswith("time_mlp_"))}
_ONLY_PI0 = {name.replace(".dense.", ".") for name in _ADAPTIVE if name.endswith("weight")}
_ONLY_PI0 |= {name for name in AXES if name.startswith(("state_proj.", "action_time_mlp_"))}


def _head_dim(sizes: Sizes) -> int:
    return (sizes.voted("keys") or GUESS) // KV_HEADS


SHAPES = ShapeTable(
    axes=AXES,
    keys=VLA_KEYS,
    depths=VLA_DEPTHS,
    variants=(
        Variant(
            "pi0",
            public="pi0",
            tiny="pi0-tiny",
            only=frozenset(_ONLY_PI0),
            values={"pi05": False, "state_input": "continuous", "max_tokens": 48},  # reference implementation
        ),
        Variant(
            "pi0.5",
            public="pi05",
            tiny="pi05-tiny",
            only=frozenset(_ONLY_PI05),
            values={"pi05": True, "state_input": "prompt", "max_tokens": 200},  # reference implementation
            # It has no state token; its codec needs only the padded width, which is that of the actions.
            padded_as={"state_dim": "action_dim"},
        ),
    ),
    derived=(VLA_IMAGE, Derived("language.head_dim", _head_dim, user_first=True), *VLA_HEADS),
    constants=(
        Constant(
            "vision.image_size",
            IMAGE_SIZE,
            f"every known pi0 checkpoint (patches of {PATCH})",
            {"vision.patch": PATCH},
        ),
        Constant(
            "language.heads",
            HEADS,
            "every known pi0 checkpoint, with one head of keys",
            unless="language.head_dim",
        ),
    ),
    public_if={"vision": "vision.width", "language": "language.width", "expert": "expert.width"},
    assumed_if=("vision.width", "language.width", "expert.width"),
    assumed=("chunk", "vision.heads"),
    stand_ins={"vision.heads": lambda sizes: 1, "chunk": lambda sizes: 1},
)
