"""The ray caster draws what it should, the same everywhere, and agrees with OpenGL about where things are."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlafit.envs import EnvSpec, make
from vlafit.envs.view import View, from_quaternion, look_at
from vlafit.errors import SimulationError

mujoco = pytest.importorskip("mujoco")
pytestmark = pytest.mark.sim

FIXTURES = Path(__file__).parents[1] / "fixtures" / "raycast"
SCENE = """
<mujoco>
  <asset><texture type="skybox" builtin="gradient" rgb1="0 0 1" rgb2="0 0 1" width="8" height="8"/></asset>
  <worldbody>
    <light directional="true" diffuse=".3 .3 .3" dir="0 0 -1"/>
    <geom type="plane" size="4 4 .1" rgba="0 1 0 1"/>
    <geom type="box" size=".2 .2 .2" pos="-.5 0 .2" rgba="1 1 1 0"/>
    <body pos=".5 0 .3"><freejoint/><geom type="sphere" size=".2" rgba="1 0 0 1"/></body>
    <site name="ball" type="sphere" size=".1" pos="-.5 0 .5" rgba="1 1 0 1"/>
    <site name="box" type="box" size=".1 .1 .1" pos="-.5 .6 .3" rgba="0 1 1 1"/>
    <site name="tube" type="cylinder" size=".1 .1" pos="-.5 -.6 .3" rgba="1 0 1 1"/>
    <site name="hidden" type="sphere" size=".3" pos="0 0 .5" rgba="1 1 1 0"/>
  </worldbody>
</mujoco>"""
ABOVE = View(np.array([0.0, 0.0, 3.0]), np.eye(3), 45.0, fixed=True)  # right is x, up is y


@pytest.fixture
def scene():
    model = mujoco.MjModel.from_xml_string(SCENE)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return model, data


def at(picture: np.ndarray, x: float, y: float, depth: float) -> np.ndarray:
    """Return the pixel [3] that shows a point at x, y, `depth` metres below the camera above."""
    n = len(picture)
    half = depth * np.tan(np.deg2rad(ABOVE.fovy) / 2)
    return picture[int((1 - y / half) * n / 2), int((1 + x / half) * n / 2)].astype(int)


def is_colour(pixel: np.ndarray, *rgb: int) -> bool:
    """Whether the bright channels are bright and the dark ones dark."""
    return all(value > 60 if bright else value < 40 for value, bright in zip(pixel, rgb, strict=True))


def test_geoms_and_sites_appear_where_and_in_the_colour_they_are(scene) -> None:
    from vlafit.envs.raycast import Raycaster

    model, data = scene
    picture = Raycaster(model, 64).render(data, "above", ABOVE)
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    assert is_colour(at(picture, 0.5, 0, 2.6), 1, 0, 0)  # the sphere that can move
    assert is_colour(at(picture, 0, 1, 3), 0, 1, 0)  # the ground; the invisible site does not cover it
    assert is_colour(at(picture, -0.5, 0.25, 3), 0, 1, 0)  # nor the invisible box
    assert is_colour(at(picture, -0.5, 0, 2.45), 1, 1, 0)
    assert is_colour(at(picture, -0.5, 0.6, 2.6), 0, 1, 1)
    assert is_colour(at(picture, -0.5, -0.6, 2.6), 1, 0, 1)
    bare = Raycaster(model, 64, sites=False).render(data, "above", ABOVE)
    assert is_colour(at(bare, -0.5, 0, 2.45), 0, 1, 0)


def test_what_is_behind_does_not_show_and_nothing_is_the_sky(scene) -> None:
    from vlafit.envs.raycast import Raycaster

    model, data = scene
    caster = Raycaster(model, 32)
    along = View(np.array([3.0, 0.0, 0.3]), look_at((3, 0, 0.3), (0, 0, 0.3)), 30.0, fixed=True)
    picture = caster.render(data, "along", along).astype(int)
    assert is_colour(picture[16, 16], 1, 0, 0)  # the sphere hides the yellow ball behind it
    assert is_colour(picture[0, 16], 0, 0, 1)
    assert is_colour(picture[-1, 16], 0, 1, 0)


def test_the_still_part_is_cast_anew_when_it_moves_and_a_moving_view_sees_the_same(scene) -> None:
    from vlafit.envs.raycast import Raycaster

    model, data = scene
    caster = Raycaster(model, 32)
    before = caster.render(data, "above", ABOVE)
    np.testing.assert_array_equal(before, caster.render(data, "above", ABOVE))
    model.geom_rgba[1, 3] = 1  # show the box
    shown = Raycaster(model, 32)
    first = shown.render(data, "above", ABOVE)
    model.geom_pos[1] = (-0.5, 0.9, 0.2)
    mujoco.mj_forward(model, data)
    second = shown.render(data, "above", ABOVE)
    assert (first != second).any()
    np.testing.assert_array_equal(second, Raycaster(model, 32).render(data, "above", ABOVE))
    loose = View(ABOVE.position, ABOVE.rotation, ABOVE.fovy, fixed=False)
    difference = np.abs(shown.render(data, "above", loose).astype(int) - second)
    assert np.median(difference) <= 2 and (difference.max(axis=-1) > 40).mean() < 0.08  # edges only


def test_rendering_leaves_the_model_and_the_data_as_they_were(scene) -> None:
    from vlafit.envs.raycast import Raycaster

    model, data = scene
    groups, state = model.geom_group.copy(), data.qpos.copy()
    Raycaster(model, 16).render(data, "above", ABOVE)
    np.testing.assert_array_equal(groups, model.geom_group)
    np.testing.assert_array_equal(state, data.qpos)


@pytest.mark.parametrize("name", ["drawer-open-v3.workspace", "push-v3.corner2", "faucet-close-v3.wrist"])
def test_pictures_are_those_of_the_committed_references(name: str) -> None:
    pytest.importorskip("metaworld")
    task, camera = name.split(".")
    picture = make(EnvSpec("metaworld", size=48, cameras=(camera,))).reset(task, 5).images[camera]
    reference = np.asarray(Image.open(FIXTURES / f"{name}.png").convert("RGB"))
    unlike = np.abs(picture.astype(int) - reference).max(axis=-1) > 2
    assert unlike.mean() < 0.005  # another processor may round a ray to the other side of an edge


def test_a_goal_that_is_only_a_marker_is_drawn_and_others_are_not() -> None:
    pytest.importorskip("metaworld")
    env = make(EnvSpec("metaworld", size=64, cameras=("workspace",)))

    def has_pure(colour: int, task: str) -> bool:
        image = env.reset(task, 5).images["workspace"].astype(int)
        others = np.delete(image, colour, axis=-1).max(axis=-1)
        return bool(((image[..., colour] > 180) & (others < 60)).any())

    assert has_pure(1, "push-v3")  # a green ball on the table
    assert not has_pure(1, "drawer-open-v3")  # whose marker is a green ball too


def test_opengl_and_rays_agree_about_where_things_are() -> None:
    pytest.importorskip("metaworld")
    try:
        picture = make(EnvSpec("metaworld", size=64, renderer="egl", cameras=("workspace",)))
        drawn = picture.reset("button-press-v3", 5).images["workspace"].astype(float)
    except SimulationError as error:
        assert "apt-get install" in str(error)
        pytest.skip("no EGL here")
    cast = make(EnvSpec("metaworld", size=64, cameras=("workspace",))).reset("button-press-v3", 5)
    rays = cast.images["workspace"].astype(float)
    for red in (drawn, rays):  # the arm and the button
        red[:] = (red[..., :1] > 1.8 * red[..., 1:].max(axis=-1, keepdims=True)) * 1.0
    overlap = (drawn * rays).sum() / np.maximum(drawn, rays).sum()
    assert overlap > 0.7
    picture.close()


def test_a_renderer_that_is_not_there_names_the_packages_and_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("metaworld")
    import vlafit.envs.gl as gl

    def broken(name: str):
        raise AttributeError("'NoneType' object has no attribute 'glGetError'")

    env = make(EnvSpec("metaworld", renderer="osmesa"))
    monkeypatch.setattr(gl.importlib, "import_module", broken)
    with pytest.raises(SimulationError, match=r'use "ray".*apt-get install .*libosmesa6'):
        env.reset("reach-v3", 0)
    assert "MUJOCO_GL" not in os.environ or os.environ["MUJOCO_GL"]  # never set to nothing


def test_a_quaternion_turns_as_mujoco_says() -> None:
    quaternion = np.array([0.3, -0.5, 0.4, 0.7])
    expected = np.zeros(9)
    mujoco.mju_quat2Mat(expected, quaternion / np.linalg.norm(quaternion))
    np.testing.assert_allclose(from_quaternion(quaternion), expected.reshape(3, 3), atol=1e-12)


def test_rays_are_cast_by_keyword_because_later_versions_of_mujoco_moved_the_arguments(
    scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlafit.envs.raycast import Raycaster

    model, data = scene
    expected = Raycaster(model, 16).render(data, "above", ABOVE)
    cast = mujoco.mj_multiRay

    def moved(*positional: object, **named: object) -> None:
        assert not positional
        cast(**named)

    monkeypatch.setattr(mujoco, "mj_multiRay", moved)
    np.testing.assert_array_equal(Raycaster(model, 16).render(data, "above", ABOVE), expected)
