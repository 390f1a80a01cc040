"""transformers' PI0ForConditionalGeneration: its names in memory and in files, and what its config.json
says.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from vlafit.checkpoints.infer import ConfigEvidence
from vlafit.checkpoints.name_map import NameMap
from vlafit.checkpoints.tensor_files import read_json_object
from vlafit.checkpoints.voting import Stated, Witness
from vlafit.errors import WeightsError, brief

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


LAYOUT = {
    "transformers' pi0": (
        f"{_TOWER}encoder.",
        f"{_TOWER}embeddings.",
        f"{_P}paligemma.model.language_model.model.",
    ),
}


def recognise(names: Iterable[str]) -> bool:
    """Whether these tensor names are those of a folder that transformers saved."""
    return any(name.startswith((f"{_TOWER}embeddings.", f"{_TOWER}encoder.")) for name in names)


COMPUTED: dict[str, dict[str, object]] = {
    "text": {"rms_norm_eps": 1e-6, "attention_bias": False, "hidden_act": "gelu_pytorch_tanh"},
    "vision": {"layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh", "num_channels": 3},
    "": {"min_period": 4e-3, "max_period": 4.0},
}
"""Values that the policy computes with; transformers (5.23) takes the same where a file is silent."""

ROPE_BASE = 10000.0  # of the rotation's periods: transformers' GemmaConfig, and what our policy computes
_DECODER = {
    "num_hidden_layers": "language.depth",
    "num_attention_heads": "language.heads",
    "num_key_value_heads": "language.kv_heads",
}
_SIZES: dict[str, dict[str, str]] = {
    "vlm_config.text_config": {
        "hidden_size": "language.width",
        "intermediate_size": "language.mlp",
        "vocab_size": "language.vocab",
        "head_dim": "language.head_dim",
        **_DECODER,
    },
    "vlm_config.vision_config": {
        "hidden_size": "vision.width",
        "num_hidden_layers": "vision.depth",
        "intermediate_size": "vision.mlp",
        "patch_size": "vision.patch",
        "image_size": "vision.image_size",
    },
    "dit_config": {"hidden_size": "expert.width", "intermediate_size": "expert.mlp", **_DECODER},
    "": {"max_state_dim": "state_dim", "max_action_dim": "action_dim"},
}


def config_evidence(tensors: Mapping[str, Tensor], folder: Path) -> ConfigEvidence:
    """Return what transformers' config.json says, and the expert's head where one is stored."""
    path = folder / "config.json"
    head = SAVED.unused[0]
    shapes = [tuple(tensors[head].shape)] if head in tensors else []
    # As many rows as the expert's own vocabulary has, which nobody uses.
    witnesses = [Witness(head, shape, "- expert.width") for shape in shapes]
    try:
        values = read_json_object(path)
        vlm, expert = values["vlm_config"], values["dit_config"]
        sections = {
            "vlm_config.text_config": vlm["text_config"],
            "vlm_config.vision_config": vlm["vision_config"],
            "dit_config": expert,
            "": values,
        }
        known = {
            "chunk": values["chunk_size"],
            "time_angles": "float32",  # as in transformers' PI0TimestepEmbeddings
            "vision": {"heads": vlm["vision_config"]["num_attention_heads"]},
            "language": {"head_dim": expert["head_dim"]},
        }
        stated = [
            Stated(field, sections[name][key], f"config.json ({name}{'.' if name else ''}{key})")
            for name, keys in _SIZES.items()
            for key, field in keys.items()
            if key in sections[name]
        ]
        for name, section in sections.items():
            kind = "vision" if "vision" in name else "text" if name else ""
            for key, value in COMPUTED[kind].items():
                if section.get(key, value) != value:
                    raise WeightsError(
                        f"{path}: {name}{'.' if name else ''}{key} is {section[key]!r}; only {value!r} is"
                        " supported here"
                    )
            rotation = section.get("rope_parameters") or {}
            if kind == "text" and rotation.get("rope_theta", ROPE_BASE) != ROPE_BASE:
                raise WeightsError(f"{path}: {name}.rope_theta is not {ROPE_BASE:g}, the only one supported")
    except (KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{path}: not the config.json that transformers writes for pi0 ({brief(error)})"
        ) from error
    return ConfigEvidence(known, stated, witnesses)
