"""Pictures of a MuJoCo scene by casting rays: no OpenGL, no display, nothing but the mujoco wheel.

Each geom has one colour (its material's, times the mean of its texture) under Lambert shading; there are no
shadows and no texture patterns. Sites are drawn too, because goal markers are sites. What does not move is
cast once, at twice the resolution, and kept until it moves; what moves is cast in every frame, its edges at
twice the resolution. The same scene gives the same bytes in every process.
"""

from dataclasses import dataclass

import mujoco
import numpy as np
from numpy.typing import NDArray

from vlafit.envs.view import View

GROUPS = np.array([1, 1, 1, 0, 0, 0], np.uint8)  # the groups that MuJoCo shows unless told otherwise
FAR = 1e10  # metres


@dataclass(eq=False)
class _Layer:
    """What rays hit: distance [n, n] in metres (FAR: nothing), geom [n, n] (-1: nothing), colour [n, n, 3]."""

    distance: NDArray[np.float64]
    geom: NDArray[np.int32]
    colour: NDArray[np.float64]


@dataclass(eq=False)
class _Still:
    """The unmoving part of a picture at twice its resolution, and the poses it was made from."""

    poses: NDArray[np.float64]
    layer: _Layer


class Raycaster:
    """Renders one model. `size` is the picture's width and height in pixels."""

    def __init__(self, model: mujoco.MjModel, size: int, *, sites: bool = True) -> None:
        self.model = model
        self.size = size
        self._colours = geom_colours(model)
        alpha = np.where(model.geom_matid >= 0, model.mat_rgba[model.geom_matid, 3], model.geom_rgba[:, 3])
        shown = (alpha > 0) & (GROUPS[np.clip(model.geom_group, 0, 5)] == 1)
        moves = model.body_weldid[model.geom_bodyid] != 0
        self._still_geoms = np.flatnonzero(shown & ~moves)
        self._moving_geoms = np.flatnonzero(shown & moves)
        self._background = _background(model)
        self._sites = np.flatnonzero((model.site_rgba[:, 3] > 0) & (model.site_group < 3)) if sites else np.array([], int)
        self._stills: dict[str, _Still] = {}
        self._rays: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}

    def render(self, data: mujoco.MjData, name: str, view: View) -> NDArray[np.uint8]:
        """Return the picture uint8 [size, size, 3] of `data` from `view`, whose pictures are remembered as `name`."""
        rays, fine = self._directions(name, view)
        n = self.size
        if view.fixed:
            still = self._still(data, name, view, fine)
            distance, colour = still.distance.copy(), still.colour.copy()
        else:
            distance = np.full((2 * n, 2 * n), FAR)
            colour = np.broadcast_to(self._background, (2 * n, 2 * n, 3)).copy()
        moving = self._cast(data, view, rays, still=not view.fixed)
        self._lay_over(data, view, fine, moving, distance, colour)
        for site in self._sites:
            self._draw_site(data, view, fine, int(site), distance, colour)
        picture = colour.reshape(n, 2, n, 2, 3).mean(axis=(1, 3))
        return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)

    def _directions(self, name: str, view: View) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the pixels' rays and those at twice the resolution."""
        if view.fixed and name in self._rays:
            return self._rays[name]
        rays = view.rays(self.size), view.rays(2 * self.size)
        self._rays[name] = rays
        return rays

    def _still(self, data: mujoco.MjData, name: str, view: View, fine: NDArray[np.float64]) -> _Layer:
        """Return what does not move, cast anew only when something of it was moved (as at a reset)."""
        geoms = self._still_geoms
        poses = np.concatenate([data.geom_xpos[geoms].ravel(), data.geom_xmat[geoms].ravel()])
        kept = self._stills.get(name)
        if kept is not None and np.array_equal(kept.poses, poses):
            return kept.layer
        groups = self.model.geom_group.copy()
        try:
            self.model.geom_group[self._moving_geoms] = 5  # hidden while the rest is cast; rays alone read groups
            layer = self._cast(data, view, fine, still=True)
        finally:
            self.model.geom_group[:] = groups
        self._stills[name] = _Still(poses, layer)
        return layer

    def _hit(
        self, data: mujoco.MjData, view: View, rays: NDArray[np.float64], still: bool
    ) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
        """Return the distance and the geom that each of rays [k, 3] meets."""
        count = len(rays)
        geom = np.full(count, -1, np.int32)
        distance = np.zeros(count)
        if count:
            vectors = np.ascontiguousarray(rays).reshape(-1)
            mujoco.mj_multiRay(
                self.model, data, view.position, vectors, GROUPS, int(still), -1, geom, distance, count, FAR
            )
        geom[distance < 0] = -1
        return np.where(geom >= 0, distance, FAR), geom

    def _cast(self, data: mujoco.MjData, view: View, rays: NDArray[np.float64], *, still: bool) -> _Layer:
        """Cast a square of rays [n, n, 3] and shade what they meet."""
        n = len(rays)
        distance, geom = self._hit(data, view, rays.reshape(-1, 3), still)
        distance, geom = distance.reshape(n, n), geom.reshape(n, n)
        points = rays * np.where(geom >= 0, distance, 0.0)[..., None]
        colour = self._colours[geom] * self._light(_normals(points, geom, rays), view)
        colour[geom < 0] = self._background
        return _Layer(distance, geom, colour)

    def _light(self, normals: NDArray[np.float64], view: View) -> NDArray[np.float64]:
        """Return the light [..., 3] that surfaces with such normals send back: the model's lamps, Lambert's law."""
        model = self.model
        head = model.vis.headlight
        light = np.asarray(head.ambient) + np.asarray(head.diffuse) * np.maximum(
            normals @ view.rotation[:, 2], 0
        )[..., None]
        for lamp in range(model.nlight):
            direction = model.light_dir[lamp] / np.linalg.norm(model.light_dir[lamp])
            facing = np.maximum(normals @ -direction, 0)[..., None]
            light = light + model.light_ambient[lamp] + model.light_diffuse[lamp] * facing
        return light

    def _lay_over(
        self,
        data: mujoco.MjData,
        view: View,
        fine: NDArray[np.float64],
        moving: _Layer,
        distance: NDArray[np.float64],
        colour: NDArray[np.float64],
    ) -> None:
        """Draw what moves over the fine picture, in place; pixels at its edges are cast again, four rays each."""
        n = self.size
        geom = np.pad(moving.geom, 1, mode="edge")
        around = [geom[1:-1, 1:-1], geom[:-2, 1:-1], geom[2:, 1:-1], geom[1:-1, :-2], geom[1:-1, 2:]]
        edge = np.zeros((n, n), bool)
        for other in around[1:]:
            edge |= other != around[0]
        rows, columns = np.nonzero(edge)
        shades = np.pad(moving.colour, ((1, 1), (1, 1), (0, 0)), mode="edge")
        up_distance = np.repeat(np.repeat(moving.distance, 2, 0), 2, 1)
        up_colour = np.repeat(np.repeat(moving.colour, 2, 0), 2, 1)
        if len(rows):
            sub_rows = (2 * rows[:, None] + [0, 0, 1, 1]).ravel()
            sub_columns = (2 * columns[:, None] + [0, 1, 0, 1]).ravel()
            hit, what = self._hit(data, view, fine[sub_rows, sub_columns], not view.fixed)
            shade = self._colours[what] * 0.75  # where no neighbour shows this geom
            r, c = np.repeat(rows, 4), np.repeat(columns, 4)
            for other, (dr, dc) in zip(around[::-1], [(1, 2), (1, 0), (2, 1), (0, 1), (1, 1)], strict=True):
                same = other[r, c] == what
                shade[same] = shades[r[same] + dr, c[same] + dc]
            up_distance[sub_rows, sub_columns] = hit
            up_colour[sub_rows, sub_columns] = shade
        nearer = up_distance < distance
        distance[nearer] = up_distance[nearer]
        colour[nearer] = up_colour[nearer]

    def _draw_site(
        self,
        data: mujoco.MjData,
        view: View,
        fine: NDArray[np.float64],
        site: int,
        distance: NDArray[np.float64],
        colour: NDArray[np.float64],
    ) -> None:
        """Draw one site over the fine picture, in place."""
        model, n = self.model, 2 * self.size
        kind, size = int(model.site_type[site]), model.site_size[site]
        centre = data.site_xpos[site] - view.position
        reach = float(size[0] if kind == mujoco.mjtGeom.mjGEOM_SPHERE else np.linalg.norm(size))
        seen = centre @ view.rotation  # right, up, towards the viewer
        depth = -seen[2]
        if depth <= reach:
            return
        scale = n / 2 / np.tan(np.deg2rad(view.fovy) / 2)
        middle = n / 2 + scale * np.array([-seen[1], seen[0]]) / depth  # row, column
        radius = scale * reach / (depth - reach) * (1 + np.linalg.norm(seen[:2]) / depth) + 1
        low = np.clip(np.floor(middle - radius), 0, n).astype(int)
        high = np.clip(np.ceil(middle + radius) + 1, 0, n).astype(int)
        if (low >= high).any():
            return
        window = slice(low[0], high[0]), slice(low[1], high[1])
        rotation = data.site_xmat[site].reshape(3, 3)
        hit, normals = _intersect(kind, size, -centre @ rotation, fine[window] @ rotation)
        nearer = hit < distance[window]
        if not nearer.any():
            return
        rgba = model.site_rgba[site].astype(float)
        if model.site_matid[site] >= 0:
            rgba = model.mat_rgba[model.site_matid[site]].astype(float)
        shade = rgba[:3] * self._light(normals[nearer] @ rotation.T, view)
        patch = colour[window]
        patch[nearer] = rgba[3] * shade + (1 - rgba[3]) * patch[nearer]
        if rgba[3] >= 1:
            distance[window][nearer] = hit[nearer]


def geom_colours(model: mujoco.MjModel) -> NDArray[np.float64]:
    """Return one colour a geom, [geoms + 1, 3] in 0..1; the last row stands for no geom."""
    materials = model.mat_rgba[:, :3].astype(float)
    for material in range(model.nmat):
        texture = int(model.mat_texid[material, mujoco.mjtTextureRole.mjTEXROLE_RGB])
        if texture >= 0:
            materials[material] *= _mean_texture(model, texture)
    colours = model.geom_rgba[:, :3].astype(float)
    painted = model.geom_matid >= 0
    colours[painted] = materials[model.geom_matid[painted]]
    return np.vstack([colours, np.zeros(3)])


def _mean_texture(model: mujoco.MjModel, texture: int) -> NDArray[np.float64]:
    channels = int(model.tex_nchannel[texture])
    count = int(model.tex_height[texture]) * int(model.tex_width[texture]) * channels
    start = int(model.tex_adr[texture])
    pixels = model.tex_data[start : start + count].reshape(-1, channels)
    return pixels.mean(axis=0)[np.arange(3) % channels] / 255


def _background(model: mujoco.MjModel) -> NDArray[np.float64]:
    """Return the mean colour of the sky, or black where the model has none."""
    for texture in range(model.ntex):
        if model.tex_type[texture] == mujoco.mjtTexture.mjTEXTURE_SKYBOX:
            return _mean_texture(model, texture)
    return np.zeros(3)


def _normals(
    points: NDArray[np.float64], geom: NDArray[np.int32], rays: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return unit normals [n, n, 3] that face the viewer, from the differences between neighbouring hits."""
    right, has_right = _slope(points, geom, 1)
    down, has_down = _slope(points, geom, 0)
    normals = np.cross(right, down)
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    known = has_right & has_down & (length[..., 0] > 1e-12)
    normals = np.where(known[..., None], normals / np.maximum(length, 1e-12), -rays)
    away = np.einsum("ijk,ijk->ij", normals, rays) > 0
    normals[away] *= -1
    return normals


def _slope(
    points: NDArray[np.float64], geom: NDArray[np.int32], axis: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the step [n, n, 3] from each hit to the next along `axis` on the same geom, and where there is one."""
    step = np.zeros_like(points)
    has = np.zeros(geom.shape, bool)
    ahead = (slice(None), slice(1, None)) if axis else (slice(1, None),)
    behind = (slice(None), slice(None, -1)) if axis else (slice(None, -1),)
    difference = points[ahead] - points[behind]
    same = (geom[ahead] == geom[behind]) & (geom[ahead] >= 0)
    for side in (ahead, behind):  # the step onwards wins over the step so far
        step[side] = np.where(same[..., None], difference, step[side])
        has[side] |= same
    return step, has


def _intersect(
    kind: int, size: NDArray[np.float64], origin: NDArray[np.float64], rays: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return distances [..., ] (FAR: missed) and outward normals [..., 3] of rays that meet a shape at the origin.

    All in the shape's frame; `origin` [3] is where the rays start. A capsule is taken for a cylinder.
    """
    shape = mujoco.mjtGeom
    if kind in (shape.mjGEOM_SPHERE, shape.mjGEOM_ELLIPSOID):
        radii = np.full(3, size[0]) if kind == shape.mjGEOM_SPHERE else size
        return _meet_ellipsoid(radii, origin, rays)
    if kind == shape.mjGEOM_BOX:
        return _meet_box(size, origin, rays)
    return _meet_cylinder(float(size[0]), float(size[1]), origin, rays)


def _unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _meet_ellipsoid(
    radii: NDArray[np.float64], origin: NDArray[np.float64], rays: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    start, along = origin / radii, rays / radii
    a = np.einsum("...k,...k->...", along, along)
    b = along @ start
    inside = b * b - a * (start @ start - 1)
    distance = np.where(inside >= 0, (-b - np.sqrt(np.maximum(inside, 0))) / a, FAR)
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
    inside = b * b - a * (origin[0] ** 2 + origin[1] ** 2 - radius**2)
    wall = np.where(inside >= 0, (-b - np.sqrt(np.maximum(inside, 0))) / a, FAR)
    height = origin[2] + wall * rays[..., 2]
    wall = np.where((wall > 0) & (wall < FAR) & (np.abs(height) <= half), wall, FAR)
    down = np.where(np.abs(rays[..., 2]) < 1e-12, 1e-12, rays[..., 2])
    lid = (-np.sign(down) * half - origin[2]) / down
    across = origin[:2] + lid[..., None] * rays[..., :2]
    lid = np.where((lid > 0) & ((across**2).sum(axis=-1) <= radius**2), lid, FAR)
    distance = np.minimum(wall, lid)
    hit = origin + np.where(distance < FAR, distance, 0.0)[..., None] * rays
    normal = np.where((lid < wall)[..., None], [0.0, 0.0, 1.0] * -np.sign(down)[..., None], hit * [1.0, 1.0, 0.0])
    return distance, _unit(normal)
