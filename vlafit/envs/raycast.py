"""Render a MuJoCo scene by ray casting: no OpenGL or display needed, only the mujoco wheel.

Each geom has one colour (its material's, times the mean of its texture) with Lambert shading, without shadows
or texture patterns. Sites are drawn too, because goal markers are sites. Static geoms are cast once, at twice
the resolution, and cached until they move; moving geoms are cast in every frame, their edges at twice the
resolution. The same scene gives the same bytes in every process.
"""

# pyright: reportAttributeAccessIssue=false
# (mujoco is a compiled module without type information)

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mujoco
import numpy as np
from numpy.typing import NDArray

from vlafit.envs.shapes import FAR, intersect
from vlafit.envs.view import View

NO_NORMALS: dict[str, None] = {"normal": None} if "normal:" in (mujoco.mj_multiRay.__doc__ or "") else {}
GROUPS = np.array([1, 1, 1, 0, 0, 0], np.uint8)  # the geom groups that MuJoCo shows by default


@dataclass(eq=False)
class _Still:
    """The static part of an image, four samples per pixel, and the poses it was rendered from.

    `distance` is [n, n, 4] in metres (FAR: no hit), `colour` [n, n, 4, 3], `mean` [n, n, 3].
    """

    poses: NDArray[np.float64]
    distance: NDArray[np.float64]
    colour: NDArray[np.float64]
    mean: NDArray[np.float64]


@dataclass(eq=False)
class _Rays:
    """Ray directions of a view: pixel centres [n, n, 3], and four samples per pixel [n, n, 4, 3]."""

    centre: NDArray[np.float64]
    samples: NDArray[np.float64]

    @classmethod
    def of(cls, view: View, size: int) -> "_Rays":
        return cls(view.rays(size), _by_pixel(view.rays(2 * size)))


class Raycaster:
    """Renders one model. `size` is the image's width and height in pixels."""

    def __init__(self, model: mujoco.MjModel, size: int, *, sites: bool = True) -> None:
        self.model = model
        self.size = size
        self._colours = geom_colours(model)
        self._looks = np.unique(self._colours, axis=0, return_inverse=True)[1].ravel()  # equal: one colour
        self._looks[-1] = -1
        alpha = model.geom_rgba[:, 3].copy()
        painted = model.geom_matid >= 0
        alpha[painted] = model.mat_rgba[model.geom_matid[painted], 3]
        shown = (alpha > 0) & (GROUPS[np.clip(model.geom_group, 0, 5)] == 1)
        moves = model.body_weldid[model.geom_bodyid] != 0
        self._still_geoms = np.flatnonzero(shown & ~moves)
        self._moving_geoms = np.flatnonzero(shown & moves)
        self._background = _background(model)
        visible = (model.site_rgba[:, 3] > 0) & (model.site_group < 3)
        self._sites = [int(site) for site in np.flatnonzero(visible)] if sites else []
        self._stills: dict[str, _Still] = {}
        self._rays: dict[str, _Rays] = {}

    def render(self, data: mujoco.MjData, name: str, view: View) -> NDArray[np.uint8]:
        """Return the image uint8 [size, size, 3] of `data` from `view`.

        A fixed view's static geoms are cached under `name`, so a name must always mean the same view.
        """
        n = self.size
        if view.fixed:
            if name not in self._rays:
                self._rays[name] = _Rays.of(view, n)
            rays = self._rays[name]
            still = self._still(data, name, view)
        else:
            rays = _Rays.of(view, n)
            still = self._nothing()
        distance, geom = self._hit(data, view, rays.centre.reshape(-1, 3), still=not view.fixed)
        distance, geom = distance.reshape(n, n), geom.reshape(n, n)
        edge = self._edges(geom)
        windows = {
            site: window for site in self._sites if (window := self._window(data, view, site)) is not None
        }
        touched = edge | (geom >= 0)
        for window in windows.values():
            touched[window] = True
        pixels = np.nonzero(touched)  # the k pixels that differ from the static image
        order = np.full((n, n), -1)
        order[pixels] = np.arange(len(pixels[0]))
        far, colour = still.distance[pixels], still.colour[pixels]  # [k, 4], [k, 4, 3]
        self._lay_over(data, view, rays, distance, geom, edge, pixels, far, colour)
        for site, window in windows.items():
            rows = order[window].ravel()
            far[rows], colour[rows] = self._draw_site(
                data, view, site, rays.samples[window].reshape(-1, 4, 3), far[rows], colour[rows]
            )
        picture = still.mean.copy()
        picture[pixels] = colour.mean(axis=1)
        return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)

    def close(self) -> None:
        """Clear the cached static images."""
        self._stills.clear()
        self._rays.clear()

    def _nothing(self) -> _Still:
        n = self.size
        colour = np.broadcast_to(self._background, (n, n, 4, 3))
        return _Still(np.zeros(0), np.full((n, n, 4), FAR), colour, colour[:, :, 0])

    def _still(self, data: mujoco.MjData, name: str, view: View) -> _Still:
        """Return the static part, cast again only when one of its geoms was moved (as by a reset)."""
        geoms, n = self._still_geoms, self.size
        poses = np.concatenate([data.geom_xpos[geoms].ravel(), data.geom_xmat[geoms].ravel()])
        kept = self._stills.get(name)
        if kept is not None and np.array_equal(kept.poses, poses):
            return kept
        rays = view.rays(2 * n)
        with self._hidden(self._moving_geoms):
            distance, geom = self._hit(data, view, rays.reshape(-1, 3), still=True)
        geom = geom.reshape(2 * n, 2 * n)
        colour = self._shade(rays, distance.reshape(2 * n, 2 * n), geom, view)
        samples = _by_pixel(colour)
        still = _Still(poses, _by_pixel(distance.reshape(2 * n, 2 * n)), samples, samples.mean(axis=2))
        self._stills[name] = still
        return still

    @contextmanager
    def _hidden(self, geoms: NDArray[np.intp]) -> Iterator[None]:
        """Hide some geoms from rays within this block; nothing else reads a geom's group."""
        groups = self.model.geom_group[geoms].copy()
        self.model.geom_group[geoms] = 5
        try:
            yield
        finally:
            self.model.geom_group[geoms] = groups

    def _hit(
        self, data: mujoco.MjData, view: View, rays: NDArray[np.float64], *, still: bool
    ) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
        """Return the distance and the geom that each of rays [k, 3] hits; FAR and -1 without a hit."""
        count = len(rays)
        geom = np.full(count, -1, np.int32)
        distance = np.full(count, -1.0)
        if count:
            flat = np.ascontiguousarray(rays).reshape(-1)
            with self._hidden(self._out_of_sight(data, view)):
                mujoco.mj_multiRay(  # by keyword, because later versions have one more argument in between
                    m=self.model,
                    d=data,
                    pnt=view.position,
                    vec=flat,
                    geomgroup=GROUPS,
                    flg_static=int(still),
                    bodyexclude=-1,
                    geomid=geom,
                    dist=distance,
                    nray=count,
                    cutoff=FAR,
                    **NO_NORMALS,
                )
        geom[distance < 0] = -1
        return np.where(geom >= 0, distance, FAR), geom

    def _out_of_sight(self, data: mujoco.MjData, view: View) -> NDArray[np.intp]:
        """Return the moving geoms whose bounding spheres are entirely outside the image."""
        geoms = self._moving_geoms
        seen = (data.geom_xpos[geoms] - view.position) @ view.rotation  # right, up, towards the viewer
        half = np.deg2rad(view.fovy) / 2
        beside = np.maximum(np.abs(seen[:, 0]), np.abs(seen[:, 1])) * np.cos(half) + seen[:, 2] * np.sin(half)
        return geoms[np.maximum(beside, seen[:, 2]) > self.model.geom_rbound[geoms]]

    def _edges(self, geom: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Return the pixels [n, n] with a neighbour of another material colour."""
        look = self._looks[geom]
        edge = np.zeros(geom.shape, bool)
        for near, next_to in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
            different = look[near] != look[next_to]
            edge[near] |= different
            edge[next_to] |= different
        return edge

    def _shade(
        self, rays: NDArray[np.float64], distance: NDArray[np.float64], geom: NDArray[np.int32], view: View
    ) -> NDArray[np.float64]:
        """Return the colours [n, m, 3] at the hits of rays [n, m, 3]."""
        colour = np.empty(rays.shape)
        colour[:] = self._background
        hit = geom >= 0
        if hit.any():
            points = rays * np.where(hit, distance, 0.0)[..., None]
            normals = _normals(points, geom, rays)[hit]
            colour[hit] = self._colours[geom[hit]] * self._light(normals, view)
        return colour

    def _lay_over(
        self,
        data: mujoco.MjData,
        view: View,
        rays: _Rays,
        distance: NDArray[np.float64],
        geom: NDArray[np.int32],
        edge: NDArray[np.bool_],
        pixels: tuple[NDArray[np.intp], ...],
        far: NDArray[np.float64],
        colour: NDArray[np.float64],
    ) -> None:
        """Draw moving geoms in place over samples `far` [k, 4], `colour` [k, 4, 3] of the touched pixels.

        A pixel's four samples share the ray through its centre; at an edge, the two on the diagonal have
        their own rays.
        """
        if not len(pixels[0]):
            return
        box = np.s_[pixels[0].min() : pixels[0].max() + 1, pixels[1].min() : pixels[1].max() + 1]
        shades = np.empty(rays.centre.shape)
        shades[box] = self._shade(rays.centre[box], distance[box], geom[box], view)
        near = np.repeat(distance[pixels][:, None], 4, axis=1)
        shade = np.repeat(shades[pixels][:, None], 4, axis=1)
        at = np.flatnonzero(edge[pixels])
        rows, columns = pixels[0][at], pixels[1][at]
        hit, what = self._hit(
            data, view, rays.samples[rows, columns][:, [0, 3]].reshape(-1, 3), still=not view.fixed
        )
        hit, what = hit.reshape(-1, 2), what.reshape(-1, 2)
        paint = self._colours[what] * 0.75  # if no neighbouring pixel shows this geom
        last = self.size - 1
        for down, right in ((0, 1), (0, -1), (1, 0), (-1, 0), (0, 0)):
            r, c = np.clip(rows + down, 0, last), np.clip(columns + right, 0, last)
            paint = np.where((geom[r, c][:, None] == what)[..., None], shades[r, c][:, None], paint)
        near[at[:, None], [0, 3]] = hit
        shade[at[:, None], [0, 3]] = paint
        nearer = near < far
        far[nearer] = near[nearer]
        colour[nearer] = shade[nearer]

    def _window(self, data: mujoco.MjData, view: View, site: int) -> tuple[slice, slice] | None:
        """Return the rows and columns that a site may cover, or None if it is outside the image."""
        n, size = self.size, self.model.site_size[site]
        kind = int(self.model.site_type[site])
        reach = float(size[0] if kind == mujoco.mjtGeom.mjGEOM_SPHERE else np.linalg.norm(size))
        seen = (data.site_xpos[site] - view.position) @ view.rotation
        depth = -seen[2]
        if depth <= reach:
            return None
        scale = n / 2 / np.tan(np.deg2rad(view.fovy) / 2)
        middle = n / 2 + scale * np.array([-seen[1], seen[0]]) / depth  # row, column
        radius = scale * reach / (depth - reach) * (1 + np.linalg.norm(seen[:2]) / depth)
        low = np.clip(np.floor(middle - radius), 0, n).astype(int)
        high = np.clip(np.ceil(middle + radius), 0, n).astype(int)
        if (low >= high).any():
            return None
        return slice(low[0], high[0]), slice(low[1], high[1])

    def _draw_site(
        self,
        data: mujoco.MjData,
        view: View,
        site: int,
        rays: NDArray[np.float64],
        far: NDArray[np.float64],
        colour: NDArray[np.float64],
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the samples [k, 4] and [k, 4, 3] with one site drawn over them."""
        model = self.model
        rotation = data.site_xmat[site].reshape(3, 3)
        origin = (view.position - data.site_xpos[site]) @ rotation
        hit, normals = intersect(int(model.site_type[site]), model.site_size[site], origin, rays @ rotation)
        nearer = hit < far
        material = int(model.site_matid[site])
        rgba = (model.site_rgba[site] if material < 0 else model.mat_rgba[material]).astype(float)
        shade = rgba[:3] * self._light(normals[nearer] @ rotation.T, view)
        colour[nearer] = rgba[3] * shade + (1 - rgba[3]) * colour[nearer]
        if rgba[3] >= 1:
            far[nearer] = hit[nearer]
        return far, colour

    def _light(self, normals: NDArray[np.float64], view: View) -> NDArray[np.float64]:
        """Return the reflected light [..., 3] of surfaces: the model's lights, Lambert's law."""
        model = self.model
        head = model.vis.headlight
        light = (
            np.asarray(head.ambient)
            + np.asarray(head.diffuse) * np.maximum(normals @ view.rotation[:, 2], 0)[..., None]
        )
        for lamp in range(model.nlight):
            direction = model.light_dir[lamp] / np.linalg.norm(model.light_dir[lamp])
            facing = np.maximum(normals @ -direction, 0)[..., None]
            light = light + model.light_ambient[lamp] + model.light_diffuse[lamp] * facing
        return light


def geom_colours(model: mujoco.MjModel) -> NDArray[np.float64]:
    """Return one colour per geom, [geoms + 1, 3] in 0..1; the last row stands for no geom."""
    materials = model.mat_rgba[:, :3].astype(float)
    for material in range(model.nmat):
        texture = int(model.mat_texid[material, mujoco.mjtTextureRole.mjTEXROLE_RGB])
        if texture >= 0:
            materials[material] *= _mean_texture(model, texture)
    colours = model.geom_rgba[:, :3].astype(float)
    painted = model.geom_matid >= 0
    colours[painted] = materials[model.geom_matid[painted]]
    return np.vstack([colours, np.zeros(3)])


def _by_pixel(fine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turn [2n, 2n, ...] into [n, n, 4, ...]: the four samples of each pixel, row by row."""
    return np.ascontiguousarray(
        np.stack([fine[::2, ::2], fine[::2, 1::2], fine[1::2, ::2], fine[1::2, 1::2]], axis=2)
    )


def _mean_texture(model: mujoco.MjModel, texture: int) -> NDArray[np.float64]:
    channels = int(model.tex_nchannel[texture])
    count = int(model.tex_height[texture]) * int(model.tex_width[texture]) * channels
    start = int(model.tex_adr[texture])
    pixels = model.tex_data[start : start + count].reshape(-1, channels)
    return pixels.mean(axis=0)[np.arange(3) % channels] / 255


def _background(model: mujoco.MjModel) -> NDArray[np.float64]:
    """Return the mean colour of the sky, or black if the model has none."""
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
    """Return the step [n, n, 3] from each hit to the next along `axis`, and where both show one geom."""
    step = np.zeros_like(points)
    has = np.zeros(geom.shape, bool)
    ahead = (slice(None), slice(1, None)) if axis else (slice(1, None),)
    behind = (slice(None), slice(None, -1)) if axis else (slice(None, -1),)
    difference = points[ahead] - points[behind]
    same = (geom[ahead] == geom[behind]) & (geom[ahead] >= 0)
    for side in (ahead, behind):  # the step to the next pixel takes precedence
        step[side] = np.where(same[..., None], difference, step[side])
        has[side] |= same
    return step, has
