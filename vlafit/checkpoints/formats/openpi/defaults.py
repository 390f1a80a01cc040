"""What nothing in another program's checkpoint tells: what is assumed of it, and what must be asked for.

Whatever is assumed is a note in the load report.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from vlafit.checkpoints.formats.openpi.names import CONFIG_KEYS
from vlafit.checkpoints.options import Given
from vlafit.checkpoints.tensor_files import read_object
from vlafit.errors import ConfigError
from vlafit.policies.pi0 import Pi0Config


def from_public(made: Pi0Config, told: Mapping[str, Any]) -> tuple[str, ...]:
    """Say what of `made` comes from the public size of the same widths, for nothing in `told` says it."""
    found = [] if "chunk" in told else [f"chunk is {made.chunk}"]
    found += [] if "heads" in told.get("vision", {}) else [f"vision.heads is {made.vision.heads}"]
    note = f"{' and '.join(found)}: assumed, as in the public model of these widths; config says otherwise"
    return (note,) if found else ()


def chunk_of(params: Path, given: Given) -> tuple[dict[str, object], tuple[str, ...]]:
    """Return what a config.json tells of the Orbax checkpoint `params`, and notes.

    Orbax holds no config. openpi's config.json counts where a converter left it, beside `params` or one
    folder up.
    """
    for folder in params.parents[:2]:
        chunk = _horizon(folder / "config.json")
        if chunk is not None:
            note = f"chunk is {chunk}, the action_horizon in {folder / 'config.json'}"
            return {"chunk": chunk}, () if "chunk" in given.fields else (note,)
    return {}, ()


def _horizon(path: Path) -> object:
    values = read_object(path)
    return values["action_horizon"] if values is not None and set(values) == CONFIG_KEYS else None


def require_factors(params: Path, weights: Collection[str], given: Given) -> None:
    """Raise ConfigError for what is said of LoRA factors that are not there; `weights` have some."""
    where = str(params)
    if not weights:
        given.refuse("lora", where, "the checkpoint has no LoRA factors")
    scaled = {"expert" if "_1/" in name else "language" for name in weights if "/attn/" in name}
    for part in ("language", "expert"):
        if f"{part}_alpha" in given.lora and part not in scaled:
            raise ConfigError(
                f"{where}: config: lora.{part}_alpha would have no effect: the attention of the {part} has no"
                " LoRA factors (those of its MLP are not scaled)"
            )
    if not scaled:
        given.refuse("lora", where, "factors of the MLPs alone are not scaled")
