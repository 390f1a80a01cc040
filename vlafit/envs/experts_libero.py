"""A scripted expert for LIBERO's tasks, from the simulator's own poses of objects and of parts of fixtures.

It picks one object up and places it, pushes a dish, turns a knob on or pulls a drawer open. What it makes are
scripted demonstrations, not LIBERO's human ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from vlafit.envs.experts_libero_parts import PartProgress, aim_at_part
from vlafit.envs.experts_libero_place import PlaceProgress, aim_of_place
from vlafit.envs.experts_libero_push import PushProgress, aim_of_push
from vlafit.envs.libero_control import Hand, towards
from vlafit.errors import SimulationError
from vlafit.types import ActionChunk, EpisodeKey, Observation

PROGRESS = {"part": PartProgress, "push": PushProgress, "place": PlaceProgress}  # of each motion


@dataclass
class _Progress:
    """What the expert remembers of an episode."""

    motion: PartProgress | PlaceProgress | PushProgress
    hand: Hand = field(default_factory=Hand)


class LiberoExpert:
    """Plays tasks with one goal, by `Observation.privileged`. A chunk is one action [1, 7]."""

    def __init__(self) -> None:
        self._progress: dict[tuple[str, int], _Progress] = {}

    def act(self, observations: Sequence[Observation], keys: Sequence[EpisodeKey]) -> list[ActionChunk]:
        """Return one action for each observation, in [-1, 1]."""
        return [self._act(observation, key) for observation, key in zip(observations, keys, strict=True)]

    def _act(self, observation: Observation, key: EpisodeKey) -> ActionChunk:
        facts, kind = observation.privileged, motion(observation)
        if not kind:
            raise SimulationError(
                f"task {key.task!r}: the scripted expert only plays tasks with one goal: one object to "
                "move, one drawer to open, or one knob to turn on. It puts nothing into a closed drawer. "
                "Remove the task from record.tasks"
            )
        start = (key.task, key.seed)
        if key.replan == 0 or start not in self._progress:
            self._progress[start] = _Progress(PROGRESS[kind](stay=facts["hand"].copy()))
        progress = self._progress[start]
        match progress.motion:
            case PartProgress() as part:
                aim = aim_at_part(facts, part)
            case PushProgress() as push:
                aim = aim_of_push(facts, push)
            case place:
                aim = aim_of_place(facts, place)
        return ActionChunk(towards(facts, aim, progress.hand)[None])


def motion(observation: Observation) -> str:
    """Return which motion a task takes, of `PROGRESS`, or "" if the expert has none for it."""
    if "part" in observation.privileged:
        return "part"
    if "grasped" not in observation.privileged:
        return ""
    return "push" if observation.instruction.startswith("push ") else "place"
