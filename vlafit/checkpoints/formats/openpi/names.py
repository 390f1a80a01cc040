"""openpi's PyTorch checkpoints of pi0 and pi0.5: their tensor names, and what their config.json says.

`safetensors.torch.save_model` drops `embed_tokens`, which is tied to `paligemma.lm_head`; the expert's own
`lm_head` is random and feeds nothing.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vlafit.checkpoints.formats.openpi.variants import stated_by_variants
from vlafit.checkpoints.infer import ConfigEvidence
from vlafit.checkpoints.name_map import NameMap
from vlafit.checkpoints.tensor_files import read_json_if_present
from vlafit.checkpoints.voting import Stated, Witness

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

LAYOUT = {
    "openpi's pi0 or pi0.5": (
        _VISION,
        f"{PREFIX}paligemma.model.language_model.layers.",
    ),
}

CONFIG_KEYS = {"action_dim", "action_horizon", "paligemma_variant", "action_expert_variant", "precision"}
FAST_KEYS = {"action_dim", "action_horizon", "max_token_len", "paligemma_variant"}
"""Of the config.json that vlafit writes beside pi0-FAST's Orbax folder: the fields of `Pi0FASTConfig`."""


def recognise(names: Iterable[str]) -> bool:
    """Whether these tensor names are openpi's."""
    every = list(names)
    expert = any(name.startswith(f"{PREFIX}gemma_expert.") for name in every)
    return expert and any(name.startswith(_VISION) for name in every)


def config_evidence(tensors: Mapping[str, Tensor], folder: Path) -> ConfigEvidence:
    """Return what openpi's own config.json beside the weights says, and the unused head, of a row a token.

    A file with other keys is not openpi's and is left alone.
    """
    head = NAMES.unused[0]
    shapes = [tuple(tensors[head].shape)] if head in tensors else []
    witnesses = [Witness(head, shape, "language.vocab expert.width") for shape in shapes]
    values = read_config(folder)
    if values is None:
        return ConfigEvidence(witnesses=witnesses, padded_as=PADDED)
    width, source = values["action_dim"], "config.json (action_dim)"
    stated = [Stated(key, width, source) for key in ("action_dim", "state_dim")]
    stated += stated_by_variants(values, "config.json")
    return ConfigEvidence({"chunk": values["action_horizon"]}, stated, witnesses, PADDED)


PADDED = {"state_dim": "action_dim"}  # openpi pads states as wide as actions


def read_config(folder: Path) -> dict[str, Any] | None:
    """Return openpi's config.json in `folder`; None where there is none, or another program's."""
    values = read_json_if_present(folder / "config.json")
    return values if values is not None and set(values) in (CONFIG_KEYS, FAST_KEYS) else None
