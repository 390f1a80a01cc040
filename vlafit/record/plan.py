"""Plan a recording from a data card, and check the card against the simulation."""

from dataclasses import dataclass, replace
from typing import Any

from vlafit import envs
from vlafit.datasets.card import Card, RecordSpec
from vlafit.envs import EnvSpec
from vlafit.errors import ConfigError
from vlafit.types import Env, require_same

STATE_KEYS = ("obs/ee_pos", "obs/gripper_states")  # datasets of the hand's position and the remaining state


@dataclass(frozen=True)
class RecordingPlan:
    """Everything that decides an episode's bytes except its task and seed."""

    spec: EnvSpec
    record: RecordSpec


def plan_recording(card: Card, episodes_per_task: int | None) -> RecordingPlan:
    """Return the plan for recording `card`. Raises ConfigError if the recorder cannot do what it asks."""
    where = str(card.file or f"card {card.name!r}")
    if card.record is None:
        raise ConfigError(f"{where}: has no [record] section, so it cannot be recorded; add one")
    if card.layout != "libero":
        raise ConfigError(f'{where}: recordings have layout "libero", not {card.layout!r}')
    if episodes_per_task is not None and episodes_per_task < 1:
        raise ConfigError(
            f"episodes_per_task = {episodes_per_task}; record at least one episode of each task"
        )
    sizes = {(camera.height, camera.width) for camera in card.robot.cameras}
    if len(sizes) != 1 or len(set(next(iter(sizes)))) != 1:
        raise ConfigError(f"{where}: cameras to record must be square and of one size; got {sorted(sizes)}")
    for camera in card.robot.cameras:
        if camera.rotate or camera.key != f"obs/{camera.name}_rgb":
            raise ConfigError(
                f"{where}: camera {camera.name!r} is recorded upright as 'obs/{camera.name}_rgb'; "
                f"set that key and rotate = 0 instead of {camera.key!r} and {camera.rotate}"
            )
    keys = {"state": card.robot.state.keys, "action": card.robot.action.keys}
    for name, expected in (("state", STATE_KEYS), ("action", ("actions",))):
        if keys[name] != expected:
            raise ConfigError(
                f"{where}: robot.{name}.keys of a recording must be {list(expected)}, not {list(keys[name])}"
            )
    record = (
        card.record
        if episodes_per_task is None
        else replace(card.record, episodes_per_task=episodes_per_task)
    )
    renderer: Any = (card.robot.renderer or "ray").partition("-")[0]  # without its version
    spec = EnvSpec(
        record.env,
        size=card.robot.cameras[0].height,
        renderer=renderer,
        cameras=tuple(camera.name for camera in card.robot.cameras),
        horizon=record.horizon + record.hold_steps,
    )
    return RecordingPlan(spec, record)


def require_recordable(card: Card, plan: RecordingPlan, env: Env) -> None:
    """Raise unless the card's robot is the simulation's, and the simulation has the tasks and an expert."""
    card_is = str(card.file or f"card {card.name!r}")
    require_same(card.embodiment, card_is, env.embodiment, f"environment {plan.spec.name!r}")
    if card.robot.renderer and card.robot.renderer != env.embodiment.renderer:
        raise ConfigError(
            f"{card_is}: robot.renderer is {card.robot.renderer!r}, "
            f"but the environment renders with {env.embodiment.renderer!r}; write that into the card"
        )
    for task in plan.record.tasks:
        env.instruction(task)  # raises for an unknown task
    envs.expert(plan.spec.name)
