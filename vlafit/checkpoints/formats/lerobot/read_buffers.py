"""Read the codec of LeRobot 0.1 to 0.3: statistics among the weights, everything else in its code.

The code is policies/normalize.py, pi0/modeling_pi0.py and smolvla/modeling_smolvla.py of these versions. They
had no processors, and divided a range with 1e-8 added, which is left out here.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from vlafit.checkpoints.formats.lerobot import read_processors as processors
from vlafit.checkpoints.formats.lerobot import stored_statistics as stored
from vlafit.checkpoints.formats.lerobot.processor_steps import require_repeated
from vlafit.checkpoints.formats.lerobot.read_config import LeRobotConfig, read_config
from vlafit.checkpoints.formats.lerobot.stored_statistics import ACTION, STATE, Sets
from vlafit.codec import Codec, CodecConfig, Tokenizer
from vlafit.codec.normaliser import Normalisation
from vlafit.codec.prompts import holds_state
from vlafit.errors import WeightsError
from vlafit.nn.policy import Needs

INPUTS, TARGETS, OUTPUTS = "normalize_inputs.", "normalize_targets.", "unnormalize_outputs."


def present(folder: Path, buffers: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint without processors has statistics among its weights."""
    return not any((folder / name).is_file() for name in (processors.PRE, processors.POST)) and bool(
        sets_of(buffers)
    )


def lacks_tokenizer(folder: Path, buffers: Mapping[str, Tensor]) -> bool:
    """Whether the statistics among the weights make a codec once a tokenizer is given."""
    lerobot = read_config(folder)
    if lerobot is None or not present(folder, buffers):
        return False
    kinds: dict[str, Normalisation] = {
        "state": _mode(lerobot, "STATE"),
        "action": _mode(lerobot, "ACTION"),
    }
    own = sets_of(buffers).get("")
    return own is None or not stored.lacking(own, kinds, "", None, str(lerobot.path.parent))


def sets_of(buffers: Mapping[str, Tensor]) -> Sets:
    """Return the sets of statistics of state and action among the weights that are no weights."""
    sets: dict[str, dict[str, Tensor]] = {}
    for module, feature in ((INPUTS, STATE), (OUTPUTS, ACTION)):
        for name, tensors in stored.in_weights(buffers, module).items():
            own = {key: tensor for key, tensor in tensors.items() if key.rpartition(".")[0] == feature}
            sets.setdefault(name, {}).update(own)
    return {name: tensors for name, tensors in sets.items() if tensors}


def read(
    folder: Path,
    buffers: Mapping[str, Tensor],
    needs: Needs,
    tokenizer: Tokenizer | None = None,
    asset: str | Path | None = None,
) -> tuple[Codec | None, str]:
    """Return the codec that config.json in `folder` and the `buffers` amount to, or None and why it is None.

    Raises WeightsError for a setting that vlafit does not repeat, and for statistics that contradict each
    other.
    """
    lerobot = read_config(folder)
    if lerobot is None:
        return None, "there is no config.json of LeRobot beside its statistics"
    require_repeated([], lerobot)
    where = f"{lerobot.path.parent}: its statistics among the weights"
    kinds: dict[str, Normalisation] = {
        "state": _mode(lerobot, "STATE"),
        "action": _mode(lerobot, "ACTION"),
    }
    sets = sets_of(buffers)
    name, reason = stored.choose(sets, asset, where)
    if name is None:
        return None, reason
    chosen = sets.get(name, {})
    if lacking := stored.lacking(chosen, kinds, name, asset, where):
        return None, lacking
    slots, robot = processors.robot_of(lerobot, [])
    where += f" of {name!r}" if name else ""
    statistics = stored.read_both(chosen, kinds, robot, where)
    targets = stored.in_weights(buffers, TARGETS).get(name, {})
    for key, tensor in targets.items():
        if key in chosen and not np.array_equal(tensor.numpy(), chosen[key].numpy()):
            raise WeightsError(
                f"{where}: {TARGETS} and {OUTPUTS} differ in {key}: actions are not undone as they were"
                " normalised; one of the two was exchanged"
            )
    form = processors.form_of(lerobot, [])
    if form is None or holds_state(form.prompt):
        return None, f"LeRobot up to 0.3 had no {lerobot.values['type']}"
    if tokenizer is None:
        return (
            None,
            f"LeRobot up to 0.3 kept no tokenizer ({tokenizer_name(lerobot)!r}); give its folder as"
            " `tokenizer`",
        )
    config = CodecConfig(
        cameras=slots,
        image_size=needs.image_size,
        state_dim=needs.state_dim,
        action_dim=needs.action_dim,
        chunk=needs.chunk,
        normalisation=kinds["state"],
        action_normalisation=kinds["action"],
        prompt=form.prompt,
        max_tokens=needs.max_tokens,
        framing=form.framing,
        special_tokens=form.special_tokens,
    )
    return Codec(config, robot, statistics, tokenizer), ""


def tokenizer_name(lerobot: LeRobotConfig) -> str:
    """Return the tokenizer that LeRobot's code loads, where no processor names one."""
    named = processors.TOKENIZERS.get(lerobot.values["type"])
    return named or str(lerobot.values.get("vlm_model_name") or "")


def _mode(lerobot: LeRobotConfig, kind: str) -> Normalisation:
    modes = lerobot.get("normalization_mapping", dict)
    where = f"{lerobot.path}: normalization_mapping"
    if modes is None:
        raise WeightsError(f"{where} is missing; it says how the statistics among the weights are used")
    return processors.normalisation(modes, kind, where)
