"""openpi's PyTorch checkpoints of pi0 and pi0.5: their names, and the config that their shapes imply.

`safetensors.torch.save_model` drops `embed_tokens`, which is tied to `paligemma.lm_head`; the expert's own
`lm_head` is random and feeds nothing.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlafit.checkpoints.names import NameMap

PREFIX = "paligemma_with_expert."
_VISION = f"{PREFIX}paligemma.model.vision_tower.vision_model."

NAMES = NameMap(
    form="openpi",
    prefixes=(
        ("vision.layers.", f"{_VISION}encoder.layers."),
        ("vision.patch_embedding.", f"{_VISION}embeddings.patch_embedding."),
        ("vision.position_embedding.", f"{_VISION}embeddings.position_embedding."),
        ("vision.post_layernorm.", f"{_VISION}post_layernorm."),
        ("projector.", f"{PREFIX}paligemma.model.multi_modal_projector.linear."),
        ("language.", f"{PREFIX}paligemma.model.language_model."),
        ("expert.", f"{PREFIX}gemma_expert.model."),
    ),
    ties={"language.embed_tokens.weight": f"{PREFIX}paligemma.lm_head.weight"},
    unused=(f"{PREFIX}gemma_expert.lm_head.weight",),
)

CONFIG_KEYS = {"action_dim", "action_horizon", "paligemma_variant", "action_expert_variant", "precision"}


def recognise(tensors: Mapping[str, Any]) -> bool:
    """Whether these tensor names are openpi's."""
    expert = any(name.startswith(f"{PREFIX}gemma_expert.") for name in tensors)
    return expert and any(name.startswith(_VISION) for name in tensors)


def known_config(folder: Path) -> dict[str, object]:
    """Return what openpi's own config.json beside the weights says, as fields of `Pi0Config`.

    A file with other keys is not openpi's and is left alone.
    """
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    if not isinstance(values, dict) or set(values) != CONFIG_KEYS:
        return {}
    return {"chunk": values["action_horizon"]}


def misfits(tensors: Mapping[str, Any]) -> list[str]:
    """Name the tensors whose sizes no other tensor of ours confirms, but openpi's own rules do.

    The dead head has a row for each token, and the state is padded as the actions are.
    """
    found = []
    head, tokens = NAMES.unused[0], NAMES.ties["language.embed_tokens.weight"]
    embedding = tensors.get(tokens, tensors.get(NAMES.theirs("language.embed_tokens.weight")))
    actions, state = tensors.get("action_in_proj.weight"), tensors.get("state_proj.weight")
    if head in tensors and embedding is not None and actions is not None:
        want = (embedding.shape[0], actions.shape[0])
        if tuple(tensors[head].shape) != want:
            found.append(f"{head} is {tuple(tensors[head].shape)}, not {want}")
    if state is not None and actions is not None and state.shape[-1:] != actions.shape[-1:]:
        found.append(f"state_proj.weight is {tuple(state.shape)}, beside action_in_proj.weight"
                     f" {tuple(actions.shape)}")  # fmt: skip
    return found
