"""The tensor names of OpenVLA's checkpoints, which are timm's and transformers' of the parts.

Tokens and positions have axes of size 1 in front there. OFT's component files hold the tensors of one module
each, here with the module's name in front.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from vlafit.checkpoints.name_map import NameMap, Translated, translate

FORM = "OpenVLA"
HEAD, PROPRIO, NOISE = "action_head.", "proprio_projector.", "noisy_action_projector."
L1, DIFFUSION = f"{HEAD}model.", f"{HEAD}noise_predictor.mlp_resnet."
_TOWERS = {
    "vision.dino.": "vision_backbone.featurizer.",
    "vision.siglip.": "vision_backbone.fused_featurizer.",
}
_BLOCK = (
    ("self_attn.qkv", "attn.qkv"),
    ("self_attn.out_proj", "attn.proj"),
    ("scale1.weight", "ls1.scale_factor"),
    ("scale2.weight", "ls2.scale_factor"),
    ("film.scale", "scale"),
    ("film.shift", "shift"),
)
_TABLES = (  # of tokens, with an axis of size 1 in front in the file
    ("position_embedding.weight", "pos_embed"),
    ("class_embedding.weight", "cls_token"),
    ("register_embedding.weight", "reg_token"),
    ("pooling.latent.weight", "attn_pool.latent"),
)
_PREFIXES = tuple(
    (f"{ours}{inner}", f"{theirs}{there}")
    for ours, theirs in _TOWERS.items()
    for inner, there in (
        ("patch_embedding.", "patch_embed.proj."),
        *_TABLES,
        ("pooling.out_proj.", "attn_pool.proj."),
        ("pooling.", "attn_pool."),
        ("layers.", "blocks."),
        ("norm.", "norm."),
    )
)
_INSIDE = {
    **{f"{tower}layers.": _BLOCK for tower in _TOWERS},
    "expert.layers.": (("norm", "ffn.0"), ("fc", "ffn.1")),
}


@dataclass(frozen=True)
class OpenVLANames(NameMap):
    """A name map with words that differ inside a stack of layers, too."""

    def file_name(self, name: str) -> str:
        """Return the file's name for a policy's parameter."""
        return super().file_name(_changed(name, there=True))

    def policy_name(self, name: str) -> str:
        """Return the policy's name for a tensor of the file. An unknown one keeps its name."""
        return _changed(super().policy_name(name), there=False)


def _changed(name: str, there: bool) -> str:
    """Return `name`, of a policy or almost, with the words inside a layer as the file has them or back."""
    begin = next((one for one in _INSIDE if name.startswith(one)), "")
    number, dot, rest = name[len(begin) :].partition(".")
    if not begin or not number.isdecimal():
        return name
    for here, other in _INSIDE[begin]:
        old, new = (here, other) if there else (other, here)
        if rest == old or rest.startswith(f"{old}."):
            return f"{begin}{number}{dot}{new}{rest[len(old) :]}"
    return name


def _names(head: str) -> OpenVLANames:
    """Return the names of a policy whose action head's begin with `head` in the file."""
    return OpenVLANames(
        form=FORM,
        prefixes=(
            *_PREFIXES,
            ("language.", "language_model.model."),
            ("lm_head.", "language_model.lm_head."),
            ("expert.norm1.", f"{head}layer_norm1."),
            ("expert.norm2.", f"{head}layer_norm2."),
            ("expert.layers.", f"{head}mlp_resnet_blocks."),
            ("expert.", head),
            ("proprio_proj.", PROPRIO),
            ("noise_proj.", NOISE),
        ),
        apart=(HEAD, PROPRIO, NOISE),
    )


NAMES, OF_DIFFUSION = _names(L1), _names(DIFFUSION)
"""With the L1 head or none, and with the diffusion head."""


def _is_table(name: str) -> bool:
    return any(name == f"{tower}{table}" for tower in _TOWERS for table, _ in _TABLES)


def read(tensors: Mapping[str, Tensor]) -> Translated:
    """Return the file's tensors under our names. No number is read."""
    plain = translate(tensors, OF_DIFFUSION if any(n.startswith(DIFFUSION) for n in tensors) else NAMES)
    weights = {name: _table(tensor) if _is_table(name) else tensor for name, tensor in plain.weights.items()}
    return replace(plain, weights=weights)


def _table(tensor: Tensor) -> Tensor:
    """Return a table without its axis of size 1; one of another shape keeps a shape that `fit` refuses."""
    return tensor[0] if tensor.ndim == 3 and len(tensor) == 1 else tensor[None]


def written(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a policy's tensors as files hold them."""
    names = OF_DIFFUSION if any(name.startswith("noise_proj.") for name in weights) else NAMES
    return {
        names.file_name(name): tensor[None] if _is_table(name) else tensor for name, tensor in weights.items()
    }


def recognise(names: Collection[str]) -> bool:
    """Whether these names are those of OpenVLA."""
    return any(name.startswith("vision_backbone.featurizer.blocks.") for name in names) and any(
        name.startswith("language_model.model.layers.") for name in names
    )
