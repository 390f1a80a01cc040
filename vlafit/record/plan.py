"""Plan a recording from a data card, and check the card against the simulation."""

from dataclasses import dataclass, replace
from typing import Any, get_args

from vlafit import envs
from vlafit.datasets.card import CameraCard, Card, RecordSpec
from vlafit.envs import EnvSpec, Renderer
from vlafit.envs.checks import missing_start
from vlafit.errors import ConfigError
from vlafit.types import Env, require_same

STATE_ENDS = {
    ("obs/ee_pos", "obs/gripper_states"): (3, None),
    ("obs/ee_pos", "obs/ee_ori", "obs/gripper_states"): (3, 6, None),
    ("obs/ee_pos",): (None,),
    ("obs/ee_pos", "obs/keypoints"): (2, None),
}  # datasets of the state -> the dimension at which each ends; None: the last
RESERVED = ("actions", "dones", "rewards")  # datasets that a recording has anyway


@dataclass(frozen=True)
class RecordingPlan:
    """Everything that decides an episode's bytes except its task and seed."""

    spec: EnvSpec
    record: RecordSpec
    cameras: tuple[CameraCard, ...] = ()
    """As the card has them: the datasets of the frames, and whether they are stored upside-down."""
    state_keys: tuple[str, ...] = ("obs/ee_pos", "obs/gripper_states")


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
    if len({camera.rotate for camera in card.robot.cameras}) > 1:
        raise ConfigError(f"{where}: cameras to record must all have rotate = 0, or all rotate = 180")
    datasets = [*RESERVED, *card.robot.state.keys, *card.record.keep]
    for camera in card.robot.cameras:
        if not camera.key.startswith("obs/") or camera.flip or camera.channels not in ("", "rgb"):
            raise ConfigError(
                f"{where}: camera {camera.name!r} is recorded in RGB, with rotate = 0 or 180, in a "
                f"dataset of obs/; remove flip and channels, and set a key such as 'obs/{camera.name}_rgb' "
                f"instead of {camera.key!r}"
            )
        datasets.append(camera.key)
    if tuple(card.robot.state.keys) not in STATE_ENDS:
        listed = " or ".join(str(list(keys)) for keys in STATE_ENDS)
        raise ConfigError(
            f"{where}: robot.state.keys of a recording must be {listed}, not {list(card.robot.state.keys)}"
        )
    if card.robot.action.keys != ("actions",):
        raise ConfigError(
            f"{where}: robot.action.keys of a recording must be ['actions'], not "
            f"{list(card.robot.action.keys)}"
        )
    twice = sorted({name for name in datasets if datasets.count(name) > 1})
    if twice:
        raise ConfigError(f"{where}: datasets of a recording named twice: {', '.join(twice)}; rename one")
    record = (
        card.record
        if episodes_per_task is None
        else replace(card.record, episodes_per_task=episodes_per_task)
    )
    renderer: Any = (card.robot.renderer or "ray").partition("-")[0]  # without its version
    if renderer not in get_args(Renderer):
        renderer = "auto"  # a simulation's own, such as pygame; `require_recordable` compares the names
    spec = EnvSpec(
        record.env,
        size=card.robot.cameras[0].height,
        renderer=renderer,
        cameras=tuple(camera.name for camera in card.robot.cameras),
        horizon=record.horizon + record.hold_steps,
    )
    return RecordingPlan(spec, record, card.robot.cameras, card.robot.state.keys)


def require_recordable(card: Card, plan: RecordingPlan, env: Env) -> None:
    """Raise unless the card's robot is the simulation's, and the simulation has the tasks and an expert."""
    card_is = str(card.file or f"card {card.name!r}")
    require_same(card.embodiment, card_is, env.embodiment, f"environment {plan.spec.name!r}")
    if card.robot.renderer and card.robot.renderer != env.embodiment.renderer:
        raise ConfigError(
            f"{card_is}: robot.renderer is {card.robot.renderer!r}, "
            f"but the environment renders with {env.embodiment.renderer!r}; write that into the card"
        )
    first, least = plan.record.first_seed, int(getattr(env, "recorded_from", 0))
    if first < least:
        raise ConfigError(
            f"{card_is}: record.first_seed = {first}: seeds below {least} are the starts from which policies "
            f"of environment {plan.spec.name!r} are evaluated; set it to {least} or more"
        )
    for task in plan.record.tasks:
        env.instruction(task)  # raises for an unknown task
        if missing := missing_start(env, task, range(first, first + plan.record.episodes_per_task)):
            raise ConfigError(f"{card_is}: record.first_seed = {first}: {missing}")
    envs.expert(plan.spec.name)
