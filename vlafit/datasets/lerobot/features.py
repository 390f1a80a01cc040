"""Read a feature of info.json: its dimensions, the axes of a camera, whether it is a depth map."""

import json
from collections.abc import Iterable
from pathlib import Path

from vlafit.errors import DataError


def width_of(feature: object, key: str, root: Path) -> int:
    """Return the dimensions of a column. Raises DataError if it is no list of numbers."""
    shape = feature.get("shape") if isinstance(feature, dict) else None
    if not isinstance(shape, list) or len(shape) > 1 or not all(isinstance(n, int) for n in shape):
        raise DataError(f"{root}/meta/info.json: {key} has shape {shape}, a column has one axis")
    return shape[0] if shape else 1


def size_of(feature: object, key: str, root: Path) -> tuple[int, int]:
    """Return (height, width) of a camera, whose axes are in the order that `names` says."""
    shape = feature.get("shape") if isinstance(feature, dict) else None
    names = feature.get("names") if isinstance(feature, dict) else None
    if not isinstance(shape, list) or len(shape) != 3:
        raise DataError(f"{root}/meta/info.json: {key} has shape {shape}, a camera has three axes")
    flat = [str(name).lower().rstrip("s") for name in names] if isinstance(names, list) else []
    if len(flat) == 3 and {"height", "width"} <= set(flat):
        return shape[flat.index("height")], shape[flat.index("width")]
    if (shape[0] == 3) != (shape[2] == 3):
        return (shape[1], shape[2]) if shape[0] == 3 else (shape[0], shape[1])
    raise DataError(f"{root}/meta/info.json: {key}: names {json.dumps(names)} do not say which axis is which")


def is_depth(feature: object) -> bool:
    """Whether an image feature is a depth map."""
    if not isinstance(feature, dict):
        return False
    info = feature.get("info") or feature.get("video_info") or {}
    return bool(
        feature.get("dtype") == "depth"
        or feature.get("is_depth_map")
        or info.get("is_depth_map")
        or info.get("video.is_depth_map")
    )


def success_feature(features: Iterable[str]) -> str:
    """Return the feature that seems to say whether an episode succeeded; "" if none does."""
    return next((key for key in features if "success" in key.lower()), "")
