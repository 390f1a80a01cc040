"""The recorded pi0-FAST as a whole folder of LeRobot's: weights, config.json, processors, tokenizers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).parents[1] / "fixtures" / "lerobot_pi0_fast"
TOLD = {"vision.heads": 4}  # of which LeRobot knows 16 alone


def write_folder(folder: Path, weights: str = "") -> Path:
    """Write the checkpoint into the new `folder`; `weights` may be "overfit"."""
    shutil.copytree(RECORDED / "processors", folder)
    shutil.copy(RECORDED / "config.json", folder)
    shutil.copy(RECORDED / weights / "model.safetensors", folder)
    shutil.copytree(RECORDED / "text_tokenizer", folder / "text_tokenizer")
    shutil.copytree(RECORDED / "fast_tokenizer", folder / "fast_tokenizer")
    edit(folder / "config.json", lambda values: values.update(paligemma_variant="tiny"))  # no size has it
    edit(folder / "policy_preprocessor.json", hold_tokenizer)
    return folder


def hold_tokenizer(values: dict[str, Any]) -> None:
    for step in values["steps"]:
        if step["registry_name"] == "tokenizer_processor":
            step["artifacts"] = {"tokenizer_name": "text_tokenizer"}


def step_of(values: dict[str, Any], name: str) -> dict[str, Any]:
    return next(step["config"] for step in values["steps"] if step["registry_name"] == name)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
