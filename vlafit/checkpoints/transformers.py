"""transformers' PI0ForConditionalGeneration: its names in memory and in the files that it saves."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlafit.checkpoints.names import NameMap
from vlafit.errors import WeightsError

_ACTION = "embed_action_time."
_VLM = "model.vlm."

LIVE = NameMap(  # transformers 5.23
    form="transformers (in memory)",
    prefixes=(
        ("vision.layers.", f"{_VLM}vision_tower.encoder.layers."),
        ("vision.patch_embedding.", f"{_VLM}vision_tower.embeddings.patch_embedding."),
        ("vision.position_embedding.", f"{_VLM}vision_tower.embeddings.position_embedding."),
        ("vision.post_layernorm.", f"{_VLM}vision_tower.post_layernorm."),
        ("projector.", f"{_VLM}multi_modal_projector.linear."),
        ("language.", f"{_VLM}language_model."),
        ("expert.", "model.dit."),
        ("state_proj.", f"{_ACTION}state_proj."),
        ("action_in_proj.", f"{_ACTION}action_in_proj."),
        ("action_time_mlp_in.", f"{_ACTION}action_time_mlp_in."),
        ("action_time_mlp_out.", f"{_ACTION}action_time_mlp_out."),
    ),
    unused=("model.dit.embed_tokens.weight",),
)
"""Names of the module's state dict."""

_P = "paligemma_with_expert."
_TOWER = f"{_P}paligemma.model.vision_tower."

SAVED = NameMap(
    form="transformers",
    prefixes=(
        ("vision.layers.", f"{_TOWER}encoder.layers."),
        ("vision.patch_embedding.", f"{_TOWER}embeddings.patch_embedding."),
        ("vision.position_embedding.", f"{_TOWER}embeddings.position_embedding."),
        ("vision.post_layernorm.", f"{_TOWER}post_layernorm."),
        ("projector.", f"{_P}paligemma.model.multi_modal_projector.linear."),
        ("language.", f"{_P}paligemma.model.language_model.model."),
        ("expert.", f"{_P}gemma_expert.model."),
    ),
    unused=(f"{_P}gemma_expert.lm_head.weight",),
)
"""Names in the files that `save_pretrained` writes."""


def recognise(tensors: Mapping[str, Any]) -> bool:
    """Whether these tensor names are those of a folder that transformers saved."""
    return any(name.startswith((f"{_TOWER}embeddings.", f"{_TOWER}encoder.")) for name in tensors)


def known_config(folder: Path) -> dict[str, object]:
    """Return what transformers' config.json says and shapes do not, as fields of `Pi0Config`."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        vlm = values["vlm_config"]
        return {
            "chunk": values["chunk_size"],
            "time_angles": "float32",  # as in transformers' PI0TimestepEmbeddings
            "vision": {"heads": vlm["vision_config"]["num_attention_heads"]},
            "language": {"head_dim": values["dit_config"]["head_dim"]},
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{path}: not the config.json that transformers writes for pi0 ({error!r})"
        ) from error
