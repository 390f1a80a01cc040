"""Take a checkpoint out of the house: to LeRobot, to openpi's PyTorch code, or to transformers."""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args

from vlafit import files
from vlafit.checkpoints import lerobot_export, openpi_export, transformers_export
from vlafit.checkpoints.load import load
from vlafit.codec import Codec
from vlafit.errors import WeightsError, did_you_mean
from vlafit.nn.policy import Policy

Target = Literal["lerobot", "openpi", "transformers"]
WRITERS: dict[str, ModuleType] = {
    "lerobot": lerobot_export,
    "openpi": openpi_export,
    "transformers": transformers_export,
}


@dataclass(frozen=True)
class Exported:
    """Where a checkpoint went; `notes` say what the target must be told, or does otherwise."""

    folder: Path
    target: Target
    files: tuple[str, ...]
    notes: tuple[str, ...]

    def text(self) -> str:
        """Return what a person wants to know, in a few lines."""
        lines = [f"{self.folder}: for {self.target}, {len(self.files)} files: {', '.join(self.files)}"]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def export(source: str | Path, target: Target, out: str | Path) -> Exported:
    """Write the checkpoint `source`, of any form that `load` reads, into the new folder `out`.

    Weights are written in float32. The folder appears whole or not at all. Raises WeightsError where `out` is
    there already, or the target cannot express the policy or its codec: every reason is named.
    """
    loaded = load(source)
    return write(loaded.policy, loaded.codec, target, out, str(source))


def write(policy: Policy, codec: Codec | None, target: Target, out: str | Path, where: str) -> Exported:
    """Write a policy and its codec into the new folder `out`; see `export`. `where` begins a refusal."""
    if target not in WRITERS:
        raise WeightsError(f"there is no target {target!r}{did_you_mean(target, get_args(Target))}")
    out, writer = Path(out), WRITERS[target]
    if out.exists():
        raise WeightsError(f"{out} is there already; name a new folder, or remove it first")
    reasons = writer.refusals(policy, codec)
    if reasons:
        raise WeightsError(
            f"{where}: cannot go to {target}:\n" + "\n".join(f"  {reason}" for reason in reasons)
        )
    with files.new_folder(out) as partial:
        notes = writer.write(partial, policy, codec)
        written = sorted(p.relative_to(partial).as_posix() for p in partial.rglob("*") if p.is_file())
    return Exported(out, target, tuple(written), notes)
