"""Find the checkpoint that a run's folder, or one of its pointers (last, best), leads to."""

import os
from pathlib import Path

from vlafit.errors import ConfigError, brief, command_line
from vlafit.files import parse_json, plain_text

WHOLE = (
    "policy.json",
    "manifest.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "params",  # openpi's, of JAX
    "_METADATA",
)
"""Files and folders that lie in a checkpoint, and not in a run."""
OFT_ADAPTERS = "lora_adapter"
"""The folder of adapters in a run of OpenVLA-OFT; where they are merged, the run is a checkpoint itself."""
RECIPE = "recipe.toml"
OF_A_RUN = ("run.json", "plan.json", "agreement.json", "metrics.jsonl", "checkpoints")
"""Files and folders beside recipe.toml in a run."""
SAVED = (".json", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack")
"""Endings of files of which a checkpoint has one."""


def in_run(path: Path) -> Path | None:
    """Return the checkpoint's folder for a run (its last), ``RUN/checkpoints/best`` or ``last``.

    Of the runs of LeRobot and openpi it is their last, too; of an OpenVLA-OFT run that is not merged, its
    adapters. None where `path` is none of these. Raises
    ConfigError where a pointer is damaged or leads nowhere; it names the checkpoint's folder where `path` is
    one of its files, or the folder of a run's checkpoints.
    """
    if _is_whole(path):
        return None
    if path.is_file() and (path.parent / "policy.json").is_file():
        raise ConfigError(f"{path} is one file of a checkpoint; name the checkpoint's folder: {path.parent}")
    within = sorted(path.glob("step_*/policy.json"))
    if within:
        raise ConfigError(
            f"{path} holds {len(within)} checkpoints; name one, such as the last: {within[-1].parent}"
        )
    for pointer in (path / "checkpoints" / "last.json", path.parent / f"{path.name}.json"):
        if pointer.is_file() and pointer.parent.name == "checkpoints":
            return _follow(pointer)
    steps = sorted(path.glob("checkpoints/step_*/policy.json"))
    if steps:  # killed between its first checkpoint and the pointer to it
        return steps[-1].parent
    if _is_whole(path / OFT_ADAPTERS):
        return path / OFT_ADAPTERS
    found = _of_another_program(path) if path.is_dir() else None
    if found is None and _is_begun(path):
        raise _without_checkpoint(path)
    return found


def below(path: Path) -> list[Path]:
    """Return the checkpoints, and the runs with one, that lie in a folder which is neither, by name."""
    if not path.is_dir() or _is_whole(path) or any(p.suffix in SAVED and p.is_file() for p in path.iterdir()):
        return []
    return [
        inner
        for inner in sorted(path.iterdir())
        if inner.is_dir()
        and not inner.name.startswith(".")
        and (_is_whole(inner) or any(inner.glob("checkpoints/step_*/policy.json")))
    ]


def _is_whole(folder: Path) -> bool:
    return any((folder / mark).exists() for mark in WHOLE)


def _of_another_program(run: Path) -> Path | None:
    """Return the last checkpoint of LeRobot (checkpoints/005000/pretrained_model) or openpi (4999/).

    LeRobot's link ``checkpoints/last`` says which it is: not the one of the highest step where a run was
    resumed from an earlier one.
    """
    for steps in (run, run / "checkpoints"):
        numbered = [p for p in steps.iterdir() if p.name.isdecimal()] if steps.is_dir() else []
        numbered.sort(key=lambda p: int(p.name), reverse=True)
        last = Path(os.path.realpath(steps / "last")).name
        for folder in [steps, *sorted(numbered, key=lambda p: p.name != last)]:
            for inner in (folder / "pretrained_model", folder):
                if inner != run and any((inner / mark).exists() for mark in WHOLE):
                    return inner
    return None


def _is_begun(folder: Path) -> bool:
    """Whether a folder is that of a run, of which recipe.toml is the first file."""
    if not (folder / RECIPE).is_file():
        return False
    shown = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    return shown == {RECIPE} or not shown.isdisjoint(OF_A_RUN)


def _without_checkpoint(run: Path) -> ConfigError:
    again = command_line("train", run / RECIPE, "--out", run, "--resume")
    return ConfigError(
        f"{run} is a run that has no checkpoint yet: it ended before its first one, or they were deleted. Go "
        f"on with: {again}"
    )


def _follow(pointer: Path) -> Path:
    try:
        name = parse_json(plain_text(pointer))["path"]
        if Path(name).name != name:
            raise ValueError(f"path {name!r} is not the name of a folder beside it")
        folder = pointer.parent / name
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{pointer}: damaged ({brief(error)}); name the checkpoint's own folder") from error
    if not (folder / "policy.json").is_file():
        run = pointer.parent.parent
        if (run / RECIPE).is_file() and not any(pointer.parent.glob("step_*/policy.json")):
            raise _without_checkpoint(run)
        raise ConfigError(f"{pointer} points to {folder}, which is no checkpoint; name another one")
    return folder
