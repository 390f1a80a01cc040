"""Intersect rays with the simple shapes of markers: ellipsoids, boxes, cylinders."""

# pyright: reportAttributeAccessIssue=false
# (mujoco is a compiled module without type information)

import mujoco
import numpy as np
from numpy.typing import NDArray

FAR = 1e10  # metres: distance of a ray without a hit


def intersect(
    kind: int, size: NDArray[np.float64], origin: NDArray[np.float64], rays: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return distances [...] (FAR: no hit) and outward normals [..., 3] at the hits of rays with a shape.

    All in the shape's frame; rays start at `origin` [3]. A capsule is treated as a cylinder.
    """
    shape = mujoco.mjtGeom
    if kind in (shape.mjGEOM_SPHERE, shape.mjGEOM_ELLIPSOID):
        radii = np.full(3, size[0]) if kind == shape.mjGEOM_SPHERE else size
        return _meet_ellipsoid(radii, origin, rays)
    if kind == shape.mjGEOM_BOX:
        return _meet_box(size, origin, rays)
    return _meet_cylinder(float(size[0]), float(size[1]), origin, rays)


def _first_root(a: NDArray[np.float64], b: NDArray[np.float64], c: float) -> NDArray[np.float64]:
    """Return the smaller t [...] with a t^2 + 2 b t + c = 0; FAR without a solution."""
    inside = b * b - a * c
    return np.where(inside >= 0, (-b - np.sqrt(np.maximum(inside, 0))) / a, FAR)


def _unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _meet_ellipsoid(
    radii: NDArray[np.float64], origin: NDArray[np.float64], rays: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    start, along = origin / radii, rays / radii
    a = np.einsum("...k,...k->...", along, along)
    distance = _first_root(a, along @ start, float(start @ start) - 1)
    distance = np.where(distance > 0, distance, FAR)
    hit = start + np.where(distance < FAR, distance, 0.0)[..., None] * along
    return distance, _unit(hit / radii)


def _meet_box(
    half: NDArray[np.float64], origin: NDArray[np.float64], rays: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    safe = np.where(np.abs(rays) < 1e-12, 1e-12, rays)
    near = np.minimum((-half - origin) / safe, (half - origin) / safe)
    far = np.maximum((-half - origin) / safe, (half - origin) / safe)
    enter, leave = near.max(axis=-1), far.min(axis=-1)
    distance = np.where((enter <= leave) & (enter > 0), enter, FAR)
    side = np.eye(3)[near.argmax(axis=-1)]
    return distance, -side * np.sign(safe)


def _meet_cylinder(
    radius: float, half: float, origin: NDArray[np.float64], rays: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    a = np.maximum(rays[..., 0] ** 2 + rays[..., 1] ** 2, 1e-12)
    b = rays[..., 0] * origin[0] + rays[..., 1] * origin[1]
    wall = _first_root(a, b, origin[0] ** 2 + origin[1] ** 2 - radius**2)
    height = origin[2] + wall * rays[..., 2]
    wall = np.where((wall > 0) & (wall < FAR) & (np.abs(height) <= half), wall, FAR)
    down = np.where(np.abs(rays[..., 2]) < 1e-12, 1e-12, rays[..., 2])
    lid = (-np.sign(down) * half - origin[2]) / down
    across = origin[:2] + lid[..., None] * rays[..., :2]
    lid = np.where((lid > 0) & ((across**2).sum(axis=-1) <= radius**2), lid, FAR)
    distance = np.minimum(wall, lid)
    hit = origin + np.where(distance < FAR, distance, 0.0)[..., None] * rays
    normal = np.where(
        (lid < wall)[..., None], [0.0, 0.0, 1.0] * -np.sign(down)[..., None], hit * [1.0, 1.0, 0.0]
    )
    return distance, _unit(normal)
