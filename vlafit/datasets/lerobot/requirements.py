"""Whether a card agrees with the features that info.json lists."""

from vlafit.agreement.columns import plain_label
from vlafit.datasets.card import ColumnCard, RobotCard
from vlafit.datasets.columns import parse_key
from vlafit.datasets.lerobot.features import is_depth, size_of, width_of
from vlafit.datasets.lerobot.meta import Meta, labels
from vlafit.errors import DataError


def require_features(robot: RobotCard, meta: Meta) -> None:
    """Raise DataError where a card's rate, columns or cameras differ from what info.json says."""
    if abs(robot.hz - meta.fps) > 0.01 * meta.fps:
        raise DataError(
            f"{meta.root}: info.json says fps {meta.fps:g}, the card robot.hz {robot.hz:g}; rows are "
            "read one by one, so correct the one that is wrong"
        )
    for name, column in (("robot.state", robot.state), ("robot.action", robot.action)):
        parsed = [parse_key(key, f"{meta.root}: {name}") for key in column.keys]
        widths = [k.width(width_of(meta.feature(k.path, name), k.path, meta.root)) for k in parsed]
        if sum(widths) != column.dimensions:
            raise DataError(
                f"{meta.root}: {name} has {sum(widths)} dimensions ({', '.join(column.keys)}), the card "
                f"says {column.dimensions}"
            )
        _require_order(name, column, meta)
    for camera in robot.cameras:
        feature = meta.feature(camera.key, f"camera {camera.name!r}", frames=True)
        if feature.get("dtype") not in ("image", "video") or is_depth(feature):
            raise DataError(
                f"{meta.root}: camera {camera.name!r}: {camera.key} is "
                f"{'a depth map' if is_depth(feature) else feature.get('dtype')}, no RGB image or video"
            )
        size = size_of(feature, camera.key, meta.root)
        if size != (camera.height, camera.width):
            raise DataError(
                f"{meta.root}: camera {camera.name!r}: {camera.key} has frames {size}, the card says "
                f"{(camera.height, camera.width)}"
            )


def _require_order(name: str, column: ColumnCard, meta: Meta) -> None:
    """Raise DataError where the card gives a dimension the name that info.json gives another."""
    parsed = [parse_key(key, name) for key in column.keys]
    every = [labels(meta.features[key.path].get("names")) for key in parsed]
    stored = [label for key, names in zip(parsed, every, strict=True) for label in names[key.some]]
    plain = [plain_label(label) for label in stored]
    if len(stored) != len(column.labels) or len(set(plain)) != len(plain):
        return  # no names, or names that do not tell dimensions apart
    for position, label in enumerate(column.labels):
        wanted = plain_label(label)
        if wanted and wanted != plain[position] and wanted in plain:
            raise DataError(
                f"{meta.root}: {name}.labels of the card are {', '.join(column.labels)}, info.json "
                f"names these dimensions {', '.join(stored)}: {label} is dimension {plain.index(wanted)} "
                f"there. Write the labels in the order of the files, or reorder the dimensions by keys, "
                f'such as "{parsed[0].path}[:, {plain.index(wanted)}]"'
            )
