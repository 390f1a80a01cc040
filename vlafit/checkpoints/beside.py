"""Keep what a checkpoint learned from beside another program's files, which do not say it, and read it again.

agreement.json is that of a run, with the robot and the SHA-256 of every file of weights: it speaks of these
weights only. Other programs ignore the file.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vlafit import config, files
from vlafit.agreement.values import FILE, Agreement, Item, from_content, read_content
from vlafit.checkpoints.declaration import Declaration
from vlafit.checkpoints.formats.native import read as native
from vlafit.codec import Codec, CodecSet
from vlafit.errors import WeightsError
from vlafit.types import Embodiment, Feature

ROBOT, WEIGHTS = "embodiment", "weights"
SUFFIXES = (".safetensors", ".pt", ".bin")
"""Of files that hold weights, beside those of JAX in `params/`."""
TEXTS = (".json", ".jsonl", ".md", ".txt", ".toml", ".yaml")
"""Of files that hold none, also in a format from outside."""


OLDER = Item(
    "data",
    {},
    "not known",
    "assumed",
    "the checkpoint is older than agreements: it does not say how it read data",
)
"""The only row of an agreement that is written for a checkpoint without one."""


@dataclass(frozen=True)
class Stored:
    """The agreement.json in a checkpoint's folder."""

    path: Path
    agreement: Agreement
    content: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """The checkpoint's folder."""
        return self.path.parent

    @property
    def is_beside(self) -> bool:
        """Whether it lies beside another program's files, and not in a checkpoint of ours."""
        return not native.recognise(self.folder)

    @property
    def robot(self) -> Embodiment | None:
        """The robot that it names beside another program's files; None where it names none."""
        if ROBOT not in self.content or not self.is_beside:
            return None
        return config.build(Embodiment, self.content[ROBOT], f"{self.path}: {ROBOT}")


def stored(folder: Path) -> Stored | None:
    """Return the agreement in a checkpoint of any format; None where it has none.

    Raises ConfigError for a damaged file.
    """
    content = read_content(folder) if folder.is_dir() else None
    if content is None:
        return None
    return Stored(folder / FILE, from_content(content, folder / FILE), content)


def of_one(agreement: Agreement | None, codec: Codec | None, learned: CodecSet | None) -> Agreement | None:
    """Return the agreement about one of the embodiments that a checkpoint learned; None without a codec.

    A checkpoint older than agreements says what its codec does.
    """
    if codec is None:
        return agreement
    mask, cameras = codec.config.relative, codec.config.cameras
    items = agreement.items if agreement is not None else (OLDER,)
    if learned is not None and len(learned) > 1:
        mine = f"{codec.embodiment.name}: "
        others = tuple(f"{name}: " for name in learned.names if name != codec.embodiment.name)
        items = tuple(
            replace(item, name=item.name.removeprefix(mine))
            for item in items
            if not item.name.startswith(others)
        )
    return Agreement(items, cameras, mask)


def write(folder: Path, agreement: Agreement | None, robot: Embodiment | None) -> None:
    """Write agreement.json beside the weights in `folder`; nothing where there is nothing to say."""
    if agreement is None or robot is None:
        return
    content = files.parse_json(agreement.to_json())
    content |= {
        ROBOT: asdict(robot),
        WEIGHTS: {name: files.sha256(folder / name) for name in _weights(folder)},
    }
    files.write_atomic(folder / FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def require_current(found: Stored | None, *, hash_weights: bool) -> None:
    """Raise WeightsError where an agreement.json speaks of other weights than lie beside it.

    Without `hash_weights` only the names of the files are compared. A file that is missing is the loader's to
    name.
    """
    if found is None or not found.is_beside:
        return
    path, folder = found.path, found.folder
    fix = "if the weights are meant, delete the file: data are then compared with less"
    listed = found.content.get(WEIGHTS)
    if not isinstance(listed, dict) or not listed:
        raise WeightsError(f"{path}: does not say of which weights it speaks; {fix}")
    added = [name for name in _weights(folder) if name not in listed]
    present = [name for name in _weights(folder) if name in listed and hash_weights]
    changed = [name for name in present if files.sha256(folder / name) != listed[name]]
    for what, names in (("changed", changed), ("not listed there", added)):
        if names:
            raise WeightsError(
                f"{path}: speaks of other weights than lie beside it; {what}: {', '.join(names[:3])}; {fix}"
            )


def complete(codecs: CodecSet | None, found: Stored | None, *, chosen: bool = False) -> CodecSet | None:
    """Return the codecs with what agreement.json says of the robot and the checkpoint's own files do not.

    `chosen`: the caller names the statistics, which may then be of another robot.
    """
    robot = found.robot if found is not None else None
    if codecs is None or found is None or robot is None or len(codecs) > 1:
        return codecs
    (codec,) = codecs
    if chosen and codec.embodiment.name != robot.name:
        return codecs
    return CodecSet([codec.with_changes(embodiment=_joined(codec.embodiment, robot, found.folder))])


def declared(declaration: Declaration, found: Stored | None) -> Declaration:
    """Return the declaration with what agreement.json says, and the checkpoint's own files do not."""
    if found is None:
        return declaration
    declaration = replace(declaration, agreement=found.agreement)
    robot = found.robot
    if robot is None:
        return declaration
    own = declaration.embodiment
    joined = robot if own is None else _joined(own, robot, found.folder)
    names = {camera.name for camera in robot.cameras}
    sized = bool(declaration.slots) and {slot for slot in declaration.slots if slot} <= names
    return replace(
        declaration,
        embodiment=joined,
        relative=declaration.relative if declaration.says_relative else found.agreement.relative,
        says_frame_sizes=declaration.says_frame_sizes or sized,
    )


def _joined(own: Embodiment, robot: Embodiment, folder: Path) -> Embodiment:
    same = {camera.name for camera in own.cameras} == {camera.name for camera in robot.cameras}
    return replace(
        own,
        cameras=robot.cameras if same else own.cameras,
        state=_column(own.state, robot.state, "state", folder),
        action=_column(own.action, robot.action, "action", folder),
        hz=own.hz or robot.hz,
        control=own.control or robot.control,
        renderer=own.renderer or robot.renderer,
    )


def _column(own: Feature, other: Feature, name: str, folder: Path) -> Feature:
    if own.shape != other.shape:
        raise WeightsError(
            f"{folder / FILE}: says {other.shape[0]} {name} dimensions, and the checkpoint's other files "
            f"{own.shape[0]}; copy the checkpoint again, or delete the file that is wrong"
        )
    return replace(
        own,
        labels=own.labels or other.labels,
        unit=own.unit or other.unit,
        low=own.low or other.low,
        high=own.high or other.high,
    )


def _weights(folder: Path) -> list[str]:
    """Return the files of weights below `folder`; of a format from outside all that are no texts."""
    every = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    usual = [path for path in every if path.suffix in SUFFIXES or "params" in path.parts]
    return [path.as_posix() for path in usual or [path for path in every if path.suffix not in TEXTS]]
