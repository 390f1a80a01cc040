"""LeRobot's tensor names of pi0, pi0.5, pi0-FAST and SmolVLA.

pi0 and pi0.5 come in two layouts: as `save_pretrained` writes them (every name begins with ``model.``, and
both of the tied pair are there), or as on the Hub (openpi's names, which only config.json tells apart from
openpi's). LeRobot 0.1 to 0.3 wrote pi0 with the names of older versions of transformers.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from vlafit.checkpoints.assign import raise_mismatch
from vlafit.checkpoints.formats.openpi import names as openpi
from vlafit.checkpoints.name_map import NameMap

_WITH_EXPERT = "model.vlm_with_expert."
IN_MODEL = f"model.{openpi.PREFIX}"
_VLM = f"{_WITH_EXPERT}vlm.model."
_PROJECTIONS = (
    "state_proj.",
    "action_in_proj.",
    "action_out_proj.",
    "action_time_mlp_in.",
    "action_time_mlp_out.",
    "time_mlp_in.",
    "time_mlp_out.",
)

FORM = "LeRobot"

SMOLVLA = NameMap(
    form=FORM,
    prefixes=(
        ("vision.layers.", f"{_VLM}vision_model.encoder.layers."),
        ("vision.patch_embedding.", f"{_VLM}vision_model.embeddings.patch_embedding."),
        ("vision.position_embedding.", f"{_VLM}vision_model.embeddings.position_embedding."),
        ("vision.post_layernorm.", f"{_VLM}vision_model.post_layernorm."),
        ("projector.", f"{_VLM}connector.modality_projection."),
        ("language.", f"{_VLM}text_model."),
        ("expert.", f"{_WITH_EXPERT}lm_expert."),
        *((name, f"model.{name}") for name in _PROJECTIONS),
    ),
    unused=(f"{_WITH_EXPERT}vlm.lm_head.weight",),
)

PI0 = NameMap(  # as save_pretrained writes it
    form=FORM,
    prefixes=(
        *((policy_name, f"model.{file_name}") for policy_name, file_name in openpi.NAMES.prefixes),
        *((name, f"model.{name}") for name in _PROJECTIONS),
    ),
    ties={policy_name: f"model.{file_name}" for policy_name, file_name in openpi.NAMES.ties.items()},
    unused=tuple(f"model.{name}" for name in openpi.NAMES.unused),
)

_OLD = f"{IN_MODEL}paligemma."
PI0_OLD = replace(  # as LeRobot 0.1 to 0.3 wrote it, with the names of transformers before 4.52
    PI0,
    prefixes=(
        ("language.", f"{_OLD}language_model.model."),
        *((own, other.replace(f"{_OLD}model.", _OLD)) for own, other in PI0.prefixes),
    ),
    ties={"language.embed_tokens.weight": f"{_OLD}language_model.lm_head.weight"},
)

PI0_FAST = NameMap(  # without an expert; its output layer is a tensor of its own
    form=FORM,
    prefixes=(
        *(
            (own, other)
            for own, other in PI0.prefixes
            if own.split(".")[0] in ("vision", "projector", "language")
        ),
        ("lm_head.", f"{IN_MODEL}paligemma.lm_head."),
    ),
)

_FLORENCE, _HEAD = "model.vlm.", "model.transformer."
XVLA = NameMap(  # as LeRobot 0.6.1 writes it; see `xvla_names` for the layouts before
    form=FORM,
    prefixes=(
        ("vision.", f"{_FLORENCE}vision_tower."),
        (
            "projector.visual_temporal_embed.weight",
            f"{_FLORENCE}multi_modal_projector.visual_temporal_embed.pos_idx_to_embed",
        ),
        ("projector.", f"{_FLORENCE}multi_modal_projector."),
        ("language.", f"{_FLORENCE}language_model.encoder."),
        ("action_encoder.", f"{_HEAD}action_encoder."),
        ("action_decoder.", f"{_HEAD}action_decoder."),
        ("soft_prompts.", f"{_HEAD}soft_prompt_hub."),
        ("expert.position_embedding.weight", f"{_HEAD}pos_emb"),
        ("expert.", _HEAD),
    ),
    ties={"language.embed_tokens.weight": f"{_FLORENCE}language_model.shared.weight"},
)

IN_MEMORY = {"pi0": PI0, "pi0_fast": PI0_FAST, "smolvla": SMOLVLA, "xvla": XVLA}
"""Names of the modules in LeRobot's classes, by our family."""

LAYOUTS = {"LeRobot's SmolVLA": (_WITH_EXPERT,), "LeRobot's pi0, pi0.5 or pi0-FAST": (IN_MODEL,)}

BUFFERS = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")
"""Statistics that LeRobot stored among the weights until its processors came (0.4)."""


def plain(name: str) -> str:
    """Return a tensor's name without what torch.compile puts into it."""
    return name.replace("._orig_mod.", ".")


def unmarked(tensors: Mapping[str, Tensor], where: str) -> dict[str, str]:
    """Return the names without what torch.compile puts into them, and the files' own.

    Raises WeightsError where two names differ in that alone.
    """
    stored = {plain(name): name for name in tensors}
    twice = sorted(name for name in tensors if stored[plain(name)] != name)
    if twice:
        raise_mismatch(where, {"surplus": [f"{name} beside {stored[plain(name)]}" for name in twice]})
    return stored


def layout_of(names: Iterable[str]) -> tuple[str, NameMap] | None:
    """Return our family and the name map of most of these names (without `torch.compile`'s marks).

    A stray name of another layout changes nothing. None where no name is LeRobot's or openpi's.
    """
    every = list(names)
    count = {
        sign: sum(name.startswith(sign) for name in every) for sign in (_WITH_EXPERT, IN_MODEL, openpi.PREFIX)
    }
    if not any(count.values()):
        return None
    if count[_WITH_EXPERT] > count[IN_MODEL] + count[openpi.PREFIX]:
        return "smolvla", SMOLVLA
    if count[IN_MODEL] > count[openpi.PREFIX]:
        old = sum(name.startswith((f"{_OLD}language_model.", f"{_OLD}vision_tower.")) for name in every)
        return "pi0", PI0_OLD if old > sum(name.startswith(f"{_OLD}model.") for name in every) else PI0
    return "pi0", replace(openpi.NAMES, form=FORM)


def has_own_names(names: Iterable[str]) -> bool:
    """Whether most of these names are LeRobot's own, and not openpi's as on the Hub."""
    every = [plain(name) for name in names]
    own = sum(name.startswith((_WITH_EXPERT, IN_MODEL)) for name in every)
    return own > sum(name.startswith(openpi.PREFIX) for name in every)
