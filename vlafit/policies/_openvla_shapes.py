"""How the config of OpenVLA shows in the shapes of its tensors."""

import math

from vlafit.nn.shape_table import (
    EMBEDDING_AXES,
    Derived,
    ShapeTable,
    Sizes,
    Variant,
    decoder_axes,
    linear_axes,
)

_L = "language.width"


def _norm(name: str, width: str) -> dict[str, str]:
    return {f"{name}.{leaf}": width for leaf in ("weight", "bias")}


def _tower(tower: str) -> dict[str, str]:
    name, w, mlp = f"vision.{tower}", f"vision.{tower}.width", f"vision.{tower}.mlp"
    block = f"{name}.layers.*"
    return {
        f"{name}.patch_embedding.weight": f"{w} 3 vision.patch vision.patch",
        f"{name}.patch_embedding.bias": w,
        f"{name}.position_embedding.weight": f"patches {w}",
        **_norm(f"{block}.norm1", w),
        **_norm(f"{block}.norm2", w),
        **linear_axes(f"{block}.self_attn.qkv", f"3*{w}", w),
        **linear_axes(f"{block}.self_attn.out_proj", w, w),
        **linear_axes(f"{block}.mlp.fc1", mlp, w),
        **linear_axes(f"{block}.mlp.fc2", w, mlp),
        **linear_axes(f"{block}.film.scale", w, _L),
        **linear_axes(f"{block}.film.shift", w, _L),
        **_norm(f"{name}.norm", w),
    }


_DINO, _SIGLIP = "vision.dino", "vision.siglip"
_POOL = f"{_SIGLIP}.pooling"
AXES: dict[str, str] = {
    **_tower("dino"),
    f"{_DINO}.class_embedding.weight": f"1 {_DINO}.width",
    f"{_DINO}.register_embedding.weight": f"vision.registers {_DINO}.width",
    **{f"{_DINO}.layers.*.scale{i}.weight": f"{_DINO}.width" for i in (1, 2)},
    **_tower("siglip"),
    f"{_POOL}.latent.weight": f"1 {_SIGLIP}.width",
    **linear_axes(f"{_POOL}.q", f"{_SIGLIP}.width", f"{_SIGLIP}.width"),
    **linear_axes(f"{_POOL}.kv", f"2*{_SIGLIP}.width", f"{_SIGLIP}.width"),
    **linear_axes(f"{_POOL}.out_proj", f"{_SIGLIP}.width", f"{_SIGLIP}.width"),
    **_norm(f"{_POOL}.norm", f"{_SIGLIP}.width"),
    **linear_axes(f"{_POOL}.mlp.fc1", f"{_SIGLIP}.mlp", f"{_SIGLIP}.width"),
    **linear_axes(f"{_POOL}.mlp.fc2", f"{_SIGLIP}.width", f"{_SIGLIP}.mlp"),
    **linear_axes("projector.fc1", "4*features", "features"),
    **linear_axes("projector.fc2", _L, "4*features"),
    **linear_axes("projector.fc3", _L, _L),
    **EMBEDDING_AXES,
    **decoder_axes("language"),
    "lm_head.weight": f"language.vocab {_L}",
    **_norm("expert.norm1", "step"),
    **linear_axes("expert.fc1", "expert.width", "step"),
    **_norm("expert.layers.*.norm", "expert.width"),
    **linear_axes("expert.layers.*.fc", "expert.width", "expert.width"),
    **_norm("expert.norm2", "expert.width"),
    **linear_axes("expert.fc2", "action_dim", "expert.width"),
    **linear_axes("proprio_proj.fc1", _L, "state_dim"),
    **linear_axes("proprio_proj.fc2", _L, _L),
    **linear_axes("noise_proj.fc1", _L, "1"),
    **linear_axes("noise_proj.fc2", _L, _L),
}


_OF_HEAD = frozenset(name for name in AXES if name.startswith("expert."))


def _image_size(sizes: Sizes) -> int | None:
    patches, stated = sizes.voted("patches"), sizes.stated("vision.image_size")
    if patches is None:
        return stated[0] if stated else None
    return math.isqrt(patches) * sizes["vision.patch"]


SHAPES = ShapeTable(
    axes=AXES,
    keys=(
        "vision.dino.width",
        "vision.dino.mlp",
        "vision.siglip.width",
        "vision.siglip.mlp",
        "vision.patch",
        "vision.registers",
        "language.width",
        "language.mlp",
        "language.vocab",
        "expert.width",
        "state_dim",
        "action_dim",
    ),
    depths={
        "vision.dino.depth": ("vision.dino",),
        "vision.siglip.depth": ("vision.siglip",),
        "language.depth": ("language",),
        "expert.blocks": ("expert",),
    },
    variants=(
        Variant(
            "OpenVLA",
            public="openvla",
            tiny="openvla-tiny",
            padded_as={"expert.width": _L},  # there is no action head: the format or the user says so
        ),
        Variant("OpenVLA-OFT", public="openvla-oft", tiny="openvla-oft-tiny", only=_OF_HEAD),
    ),
    derived=(
        Derived("vision.image_size", _image_size, "patches", guess=lambda sizes: sizes["vision.patch"]),
    ),
    assumed_if=("vision.dino.width", "vision.siglip.width", "language.width"),
    assumed=("vision.dino.heads", "vision.siglip.heads"),
    stand_ins={
        "vision.dino.heads": lambda sizes: 1,
        "vision.siglip.heads": lambda sizes: 1,
        "chunk": lambda sizes: 1,
    },
)
