"""What is known of a checkpoint once its headers are read, whatever program wrote it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlafit.checkpoints.formats.native.adapters import Base
from vlafit.checkpoints.name_map import Translated
from vlafit.codec import Codec
from vlafit.nn.policy import Source
from vlafit.tuning import Plan

if TYPE_CHECKING:
    from vlafit.checkpoints.formats.peft.read import Adapters


@dataclass(frozen=True)
class Found:
    """A checkpoint whose headers are read: the policy's config, and tensors under our names.

    `contents` reads the tensors where `translated` only has them on the meta device. `resized` are the shapes
    in the file of those that the policy has in another one.
    """

    path: str
    form: str
    family: str
    config: Any
    translated: Translated
    codec: Codec | None = None
    plan: Plan | None = None
    contents: Callable[[], Iterable[tuple[str, Tensor]]] | None = None
    chunk: object = None
    """Actions at once that the checkpoint itself says; None where it does not."""
    assets: Mapping[str, Path] | None = None
    """openpi's statistics; None in forms that have nothing to do with them."""
    processors: Path | None = None
    """The folder of LeRobot's processors; None in other forms."""
    notes: tuple[str, ...] = ()
    odd: tuple[str, ...] = ()
    """What contradicts the tensors that were read, in lines of an error that names all."""
    resized: Mapping[str, torch.Size] | None = None
    adapted: tuple[str, ...] = ()
    below: Base | None = None
    """The checkpoint that native adapters sit on."""
    source: Source | None = None
    """Where the weights lie, those below adapters where there are any."""
    adapters: "Adapters | None" = None
    """Those of a PEFT folder, read but not put in."""
