"""The vision-language model below a SmolVLA of a size that nobody published, as LeRobot wants it: a folder.

LeRobot makes the network from the model that `vlm_model_name` names, of which it reads the config, and the
processor for two token ids that it never embeds. Its `from_pretrained` takes a folder as well as a name of
the Hub. The weights are SmolVLA's own.
"""

import json
from pathlib import Path
from typing import Any

from vlafit.checkpoints.formats.lerobot.write_config import write_json
from vlafit.codec import Tokenizer
from vlafit.policies.smolvla import SmolVLAConfig

FOLDER = "vlm"
MARKS = {  # special tokens of SmolVLM's processor: its attribute, their text
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "image_token": "<image>",
    "end_of_utterance_token": "<end_of_utterance>",
}


def write(folder: Path, config: SmolVLAConfig, words: Tokenizer) -> None:
    """Write the folder; `words` is the policy's tokenizer, whose ids the marks come after."""
    folder.mkdir()
    write_json(folder / "config.json", _config(config))
    write_json(folder / "processor_config.json", {"processor_class": "SmolVLMProcessor"})
    write_json(folder / "preprocessor_config.json", {"image_processor_type": "SmolVLMImageProcessor"})
    write_json(folder / "video_preprocessor_config.json", {"video_processor_type": "SmolVLMVideoProcessor"})
    words.save(folder)
    path, told = folder / "tokenizer.json", folder / "tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    have = words.backend.get_vocab(with_added_tokens=True)
    for mark in (mark for mark in MARKS.values() if mark not in have):
        content["added_tokens"].append(
            {
                "id": 1 + max(words.vocab_size - 1, *(token["id"] for token in content["added_tokens"])),
                "content": mark,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        )
    write_json(path, content)
    write_json(told, json.loads(told.read_text(encoding="utf-8")) | {"extra_special_tokens": MARKS})


def _config(config: SmolVLAConfig) -> dict[str, Any]:
    """Return the config.json of a SmolVLM of these sizes."""
    v, lang = config.vision, config.language
    return {
        "model_type": "smolvlm",
        "scale_factor": v.shuffle,
        "text_config": {
            "model_type": "llama",
            "hidden_size": lang.width,
            "intermediate_size": lang.mlp,
            "num_hidden_layers": lang.depth,
            "num_attention_heads": lang.heads,
            "num_key_value_heads": lang.kv_heads,
            "head_dim": lang.head_dim,
            "vocab_size": lang.vocab,
            "rms_norm_eps": 1e-5,
        },
        "vision_config": {
            "model_type": "smolvlm_vision",
            "hidden_size": v.width,
            "intermediate_size": v.mlp,
            "num_hidden_layers": v.depth,
            "num_attention_heads": v.heads,
            "patch_size": v.patch,
            "image_size": v.image_size,
        },
    }
