"""openpi's PyTorch checkpoints of pi0 and pi0.5: their names, and the config that their shapes imply.

`safetensors.torch.save_model` drops `embed_tokens`, which is tied to `paligemma.lm_head`; the expert's own
`lm_head` is random and feeds nothing.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vlafit.checkpoints.infer.gemma_variants import stated_by_variants
from vlafit.checkpoints.infer.pi0 import Told
from vlafit.checkpoints.infer.voting import Stated, Witness
from vlafit.checkpoints.name_map import NameMap
from vlafit.checkpoints.tensor_files import read_object

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


def told_beside(tensors: Mapping[str, Tensor], folder: Path, theirs: Callable[[str], str]) -> Told:
    """Return what openpi's own config.json beside the weights says, and the dead head, of a row a token.

    A file with other keys is not openpi's and is left alone.
    """
    head = NAMES.unused[0]
    shapes = [tuple(tensors[head].shape)] if head in tensors else []
    witnesses = [Witness(head, shape, "language.vocab expert.width") for shape in shapes]
    values = _read(folder / "config.json")
    if values is None:
        return Told(witnesses=witnesses, theirs=theirs, padded_alike=True)
    width, source = values["action_dim"], "config.json (action_dim)"
    stated = [Stated(key, width, source) for key in ("action_dim", "state_dim")]
    stated += stated_by_variants(values, "config.json")
    return Told({"chunk": values["action_horizon"]}, stated, witnesses, theirs, padded_alike=True)


def _read(path: Path) -> dict[str, Any] | None:
    values = read_object(path)
    return values if values is not None and set(values) == CONFIG_KEYS else None
