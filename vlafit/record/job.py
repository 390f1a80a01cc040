"""What a recording is to be: read from a data card, and compared with the simulation it names."""

from dataclasses import dataclass, replace
from typing import Any

from vlafit import envs
from vlafit.datasets.card import Card, RecordSpec
from vlafit.envs import EnvSpec
from vlafit.errors import ConfigError
from vlafit.types import Env, require_same

STATE_KEYS = ("obs/ee_pos", "obs/gripper_states")  # where the hand's position and the rest of the state go


@dataclass(frozen=True)
class Job:
    """Everything that decides an episode's bytes, but for its task and seed."""

    spec: EnvSpec
    record: RecordSpec


def job_of(card: Card, episodes_per_task: int | None) -> Job:
    """Return what `card` asks to record. Raises ConfigError where the recorder does otherwise."""
    where = str(card.file or f"card {card.name!r}")
    if card.record is None:
        raise ConfigError(f"{where}: has no [record] section; this dataset is not one that is recorded here")
    if card.layout != "libero":
        raise ConfigError(f'{where}: recordings have layout "libero", not {card.layout!r}')
    if episodes_per_task is not None and episodes_per_task < 1:
        raise ConfigError(
            f"episodes_per_task = {episodes_per_task}; record at least one episode of each task"
        )
    sizes = {(camera.height, camera.width) for camera in card.robot.cameras}
    if len(sizes) != 1 or len(set(next(iter(sizes)))) != 1:
        raise ConfigError(
            f"{where}: to record, all cameras must have one size, as high as wide; got {sorted(sizes)}"
        )
    for camera in card.robot.cameras:
        if camera.rotate or camera.key != f"obs/{camera.name}_rgb":
            raise ConfigError(
                f"{where}: camera {camera.name!r} is recorded upright as 'obs/{camera.name}_rgb'; "
                f"write that key and rotate = 0, not {camera.key!r} and {camera.rotate}"
            )
    keys = {"state": card.robot.state.keys, "action": card.robot.action.keys}
    for name, expected in (("state", STATE_KEYS), ("action", ("actions",))):
        if keys[name] != expected:
            raise ConfigError(
                f"{where}: robot.{name}.keys of a recording are {list(expected)}, not {list(keys[name])}"
            )
    asked = (
        card.record
        if episodes_per_task is None
        else replace(card.record, episodes_per_task=episodes_per_task)
    )
    renderer: Any = card.robot.renderer or "ray"
    spec = EnvSpec(
        asked.env,
        size=card.robot.cameras[0].height,
        renderer=renderer,
        cameras=tuple(camera.name for camera in card.robot.cameras),
        horizon=asked.horizon + asked.hold_steps,
    )
    return Job(spec, asked)


def require_recordable(card: Card, job: Job, env: Env) -> None:
    """Raise unless the card's robot is the simulation's, and this has the tasks and an expert."""
    card_is = str(card.file or f"card {card.name!r}")
    require_same(card.embodiment, card_is, env.embodiment, f"environment {job.spec.name!r}")
    if card.robot.renderer and card.robot.renderer != env.embodiment.renderer:
        raise ConfigError(
            f"{card_is}: robot.renderer is {card.robot.renderer!r}, "
            f"the environment draws with {env.embodiment.renderer!r}"
        )
    for task in job.record.tasks:
        env.instruction(task)  # raises for a task that there is not
    envs.expert(job.spec.name)
