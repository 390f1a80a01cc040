"""Find the files of an OpenVLA folder, and read its config.json.

OFT keeps action head, state projection and FiLM in files of their own, which are pickles: they are refused
with the command that converts them. Nothing records the chunk, nor how many cameras a policy has.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vlafit.checkpoints.formats.openvla import film
from vlafit.checkpoints.formats.openvla.film import TOWERS
from vlafit.checkpoints.name_map import Translated
from vlafit.checkpoints.tensor_files import beside, open_tensors, read_json_if_present
from vlafit.checkpoints.voting import Stated
from vlafit.config import at, put
from vlafit.errors import WeightsError, command_line

MODEL_TYPE = "openvla"
TIMM = ("vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224")
OWN = "vlafit"  # table of config.json with what OpenVLA's programs do not record
COMPONENT = re.compile(r"(?P<module>\w+?)--(?P<step>[\w-]+)_checkpoint\.(pt|safetensors)")
PREFIXES = {
    "action_head": "action_head.",
    "proprio_projector": "proprio_projector.",
    "noisy_action_projector": "noisy_action_projector.",
    "vision_backbone": "",
}
ADAPTERS = "lora_adapter"  # in the folder of an OFT run
STATISTICS = "dataset_statistics.json"
NESTED = f"{TOWERS}.{TOWERS}."
"""How its names begin in the module that adds FiLM to it."""
COMPUTED: dict[str, object] = {  # what vlafit computes; a key that is not there is silent
    "arch_specifier": "no-align+fused-gelu-mlp",
    "use_fused_vision_backbone": True,
    "image_resize_strategy": "resize-naive",
    "n_action_bins": 256,
    "timm_model_ids": list(TIMM),
    "text_config.model_type": "llama",
    "text_config.hidden_act": "silu",
    "text_config.rope_theta": 10000.0,
    "text_config.rope_scaling": None,
    "text_config.attention_bias": False,
    "text_config.tie_word_embeddings": False,
}
SIZES_OF = {
    "text_config.hidden_size": "language.width",
    "text_config.intermediate_size": "language.mlp",
    "text_config.num_hidden_layers": "language.depth",
    "text_config.vocab_size": "language.vocab",
}
PADDED = 64  # OpenVLA's pad_to_multiple_of, which the vocabulary has beyond the tokenizer
HEADS, EPS, EOS = 32, 1e-6, 2  # transformers' LlamaConfig where text_config is silent


def read_config(folder: Path) -> Mapping[str, Any]:
    """Return config.json; empty where there is none of OpenVLA. Raises WeightsError if it is damaged."""
    values = read_json_if_present(folder / "config.json")
    return values if values is not None and values.get("model_type") == MODEL_TYPE else {}


def evidence(folder: Path) -> tuple[dict[str, Any], list[Stated]]:
    """Return config values and stated sizes of config.json. Raises WeightsError for what is not computed."""
    path, values = folder / "config.json", read_config(folder)
    for key, computed in COMPUTED.items():
        value = at(values, key, computed)
        if value != computed:
            raise WeightsError(f"{path}: {key} is {value!r}; only {computed!r} is supported here")
    heads = _whole(path, values, "text_config.num_attention_heads", HEADS)
    eps = at(values, "text_config.rms_norm_eps", EPS)
    if type(eps) is not float or not 0 < eps < 1:
        raise WeightsError(f"{path}: text_config.rms_norm_eps is {eps!r}; it must lie between 0 and 1")
    language = {
        "heads": heads,
        "kv_heads": _whole(path, values, "text_config.num_key_value_heads", heads),
        "eps": eps,
    }
    stated = [
        Stated(field, _whole(path, values, key, 0), f"{path.name} ({key})")
        for key, field in SIZES_OF.items()
        if at(values, key) is not None
    ]
    sides = at(values, "image_sizes")
    if sides is not None:
        if not isinstance(sides, list) or len(set(map(str, sides))) != 1 or type(sides[0]) is not int:
            raise WeightsError(f"{path}: image_sizes is {sides!r}; both towers must see the same squares")
        stated.append(Stated("vision.image_size", sides[0], f"{path.name} (image_sizes)"))
    own = at(values, OWN, {})
    if not isinstance(own, Mapping):
        raise WeightsError(f"{path}: {OWN} is {own!r}; it must be a table")
    eos = _whole(path, values, "text_config.eos_token_id", EOS)
    made: dict[str, Any] = {"language": language, "eos": eos}
    vocabulary = at(values, "text_config.vocab_size")
    if type(vocabulary) is int:
        padding = at(values, "pad_to_multiple_of", PADDED)
        if type(padding) is not int or padding < 0:
            raise WeightsError(
                f"{path}: pad_to_multiple_of is {padding!r}; it must be a whole number from 0 on"
            )
        made["text_vocab"] = vocabulary - padding
    if "head" in own:
        made["head"] = own["head"]
    if "state_dim" in own:
        width = _whole(path, {OWN: own}, f"{OWN}.state_dim", 0, own["state_dim"])
        stated.append(Stated("state_dim", width, f"{path.name} ({OWN}.state_dim)"))
    for key in ("chunk", "max_tokens", "vision.dino.heads", "vision.siglip.heads"):
        if key in own:
            put(made, key, _whole(path, {OWN: own}, f"{OWN}.{key}", 0, own[key]), str(path))
    return made, stated


def _whole(path: Path, values: Mapping[str, Any], key: str, default: int, value: Any = None) -> int:
    value = at(values, key, default) if value is None else value
    if type(value) is not int or value < 1:
        raise WeightsError(f"{path}: {key} is {value!r}; it must be a whole number above 0")
    return value


def components(folder: Path) -> dict[str, Path]:
    """Return OFT's component files by module, all as safetensors.

    Raises WeightsError for a pickle that is not converted, several files of a module, files of different
    steps, and a module that is none of OpenVLA-OFT's.
    """
    named: dict[str, dict[str, set[str]]] = {}
    for file in sorted(folder.iterdir()):
        match = COMPONENT.fullmatch(file.name)
        if match:
            named.setdefault(match["module"], {}).setdefault(match["step"], set()).add(file.suffix)
    chosen: dict[str, Path] = {}
    of_step: dict[str, str] = {}
    for module, steps in named.items():
        if module not in PREFIXES:
            raise WeightsError(
                f"{folder}: holds {module}--{min(steps)}_checkpoint, which is no module of OpenVLA-OFT; it "
                f"saves {', '.join(PREFIXES)}"
            )
        if len(steps) > 1:
            raise WeightsError(
                f"{folder}: {module} is there of several steps, {', '.join(sorted(steps))}; move the files "
                "that you do not mean out of the folder"
            )
        ((step, suffixes),) = steps.items()
        file = f"{module}--{step}_checkpoint"
        of_step.setdefault(step, file)
        if len(of_step) > 1:
            raise WeightsError(
                f"{folder}: {' and '.join(of_step.values())} are of different steps, which were not trained "
                "together; put the files of one step there"
            )
        if ".safetensors" not in suffixes:
            pickle = folder / f"{file}.pt"
            raise WeightsError(
                f"{pickle}: a pickle, which could run any program. Convert it safely, then load again: "
                f"{command_line('convert-pickle', pickle, '--out', f'{folder / file}.safetensors')}"
            )
        chosen[module] = beside(folder / "config.json", f"{file}.safetensors")
    return chosen


def beside_adapters(adapters: Path) -> Path:
    """Return the folder with OFT's files that belong to adapters: their run's, or their own."""
    run = adapters.resolve().parent
    known = adapters.resolve().name == ADAPTERS and (
        (run / STATISTICS).is_file() or any(COMPONENT.fullmatch(file.name) for file in run.iterdir())
    )
    return run if known else adapters


def described_in(base: Path, adapters: Path | None) -> Path:
    """Return the folder of the statistics: that of the checkpoint `base`, or of the run of adapters on it."""
    run = base if adapters is None else beside_adapters(adapters)
    return run if (run / STATISTICS).is_file() else base


def components_for(base: Path, adapters: Path | None) -> tuple[dict[str, Path], list[str]]:
    """Return the component files of the checkpoint `base`, and notes: of adapters on it, those beside them.

    Raises WeightsError as `components` does, and for FiLM beside adapters.
    """
    if adapters is None:
        return components(base), []
    folder = beside_adapters(adapters)
    chosen = components(folder)
    if not chosen:
        return components(base), []
    if TOWERS in chosen:
        raise WeightsError(
            f"{chosen[TOWERS]}: FiLM's towers hold adapters of their own, which are not merged here: merge "
            f"by OFT's vla-scripts/merge_lora_weights_and_save.py, then load {folder} without a base"
        )
    notes = [f"beside the adapters: {', '.join(file.name for file in chosen.values())}"]
    left = sorted(file.name for file in base.iterdir() if COMPONENT.fullmatch(file.name))
    if left:
        notes.append(f"not read, because the adapters have files of their own: {', '.join(left)} of {base}")
    return chosen, notes


def component_tensors(module: str, file: Path) -> dict[str, Tensor]:
    """Return a component's tensors as they are called in one file with the others."""
    prefix = PREFIXES[module]
    named = {prefix + name.removeprefix("module."): t for name, t in open_tensors([file]).items()}
    return film.merged(named, str(file)) if module == TOWERS else named


def unwrapped(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Return tensors by their plain names. Raises WeightsError where two have the same."""
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if plain(name) in made:
            raise WeightsError(
                f"{where}: {plain(name)} is there twice, with and without FiLM's wrapper: {name}"
            )
        made[plain(name)] = tensor
    return made


def called_as_stored(tensors: Translated, stored: Iterable[str]) -> Translated:
    """Return the same tensors, which errors call by their names with FiLM's wrappers, as the file does."""
    wrapped = {plain(name): name for name in stored}
    is_nested = any(name.startswith(NESTED) for name in wrapped.values())
    has_blocks = any(".block." in name for name in wrapped.values() if name.startswith(f"{TOWERS}."))

    def file_name(parameter: str) -> str:
        name = tensors.file_name(parameter)
        if name in wrapped or not name.startswith(f"{TOWERS}."):
            return wrapped.get(name, name)
        if has_blocks:  # a tensor that is missing is called as the others are
            name = film.wrapped(name)
        return f"{TOWERS}.{name}" if is_nested else name

    return replace(tensors, file_name=file_name)


def plain(name: str) -> str:
    """Return the name of a tensor without the words that FiLM's wrappers add to those of the towers."""
    name = name.replace(NESTED, f"{TOWERS}.", 1)
    return re.sub(r"^(vision_backbone\.\w+\.blocks\.\d+)\.block\.", r"\1.", name)
