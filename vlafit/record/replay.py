"""Execute recorded actions in the simulation they were recorded in, and compare what happens.

An episode starts again only from its seed, which `vlafit record` keeps and other recorders mostly do not.
Disturbed episodes are disturbed again: their files hold the expert's labels, and the card's [record] says how
the executed actions differed from them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vlafit import envs
from vlafit.datasets.card import Card, RecordSpec
from vlafit.datasets.store import EpisodeStore
from vlafit.envs import EnvSpec
from vlafit.errors import DataError, SimulationError
from vlafit.record.episode import disturbed, pushes
from vlafit.types import Env, require_same

NEAR = 1e-4  # units of the state: other versions of a simulator differ in the last bits, then drift


@dataclass(frozen=True)
class Replayed:
    """What one episode did when its actions were executed again."""

    episode: str
    steps: int
    recorded_success: bool | None
    """None if the dataset does not say."""
    success: bool
    furthest: float
    """The greatest difference of a state from the recorded one."""
    final: float
    """The same, of the last recorded state."""
    parted: int | None
    """The first step whose state differs by more than NEAR; None if none does."""

    @property
    def reproduced(self) -> bool:
        """Whether the success is as recorded and the states stayed near."""
        return self.parted is None and self.recorded_success in (None, self.success)


def spec_of(card: Card, env: str = "") -> EnvSpec:
    """Return the simulation `env`, or the one of the card's [record]; DataError if neither is named."""
    name = env or (card.record.env if card.record else "")
    if not name:
        raise DataError(
            f"dataset {card.name!r}: its card has no [record], so the simulation is unknown; name it with "
            f"--env (there are {', '.join(envs.names())}) or --protocol"
        )
    return EnvSpec(name, renderer="auto")  # no frame is compared


def replay(
    store: EpisodeStore,
    env: Env,
    episodes: Sequence[int],
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[Replayed]:
    """Execute the actions of the episodes at these positions, one after the other.

    Raises DataError if the start of one cannot be restored or no action was recorded for it, and
    EmbodimentError if the simulation's robot is another; both before anything is executed.
    """
    card = store.card
    card_is = str(card.file or f"card {card.name!r}")
    robot, simulated = (replace(e, cameras=()) for e in (store.embodiment, env.embodiment))
    require_same(robot, card_is, simulated, "the simulation")
    for number in episodes:
        _require_start(store, env, number)
    return _each(store, env, episodes, progress)


def _each(
    store: EpisodeStore, env: Env, episodes: Sequence[int], progress: Callable[[int], None]
) -> Iterator[Replayed]:
    for done, number in enumerate(episodes, start=1):
        yield _replay_one(store, env, number)
        progress(done)


def _require_start(store: EpisodeStore, env: Env, number: int) -> None:
    card, info = store.card, store.episodes[number]
    if info.seed is None:
        raise DataError(
            f"dataset {card.name!r}: episode {info.id!r} records no seed, so its start cannot be restored: "
            "positions of objects are not in states or actions. `vlafit record` keeps seeds; LeRobot, ALOHA "
            "and recordings of robots have none, and simulator states of LIBERO and robomimic are not read"
        )
    if info.task not in env.tasks:
        raise DataError(
            f"dataset {card.name!r}: episode {info.id!r} is of task {info.task!r}, which the simulation does "
            "not have; name the one it was recorded in"
        )
    if card.rows.action_shift:
        raise DataError(
            f"dataset {card.name!r}: rows.action_shift = {card.rows.action_shift} takes actions from other "
            "rows than they were executed in; replay it with a card without"
        )


def _replay_one(store: EpisodeStore, env: Env, number: int) -> Replayed:
    info, record = store.episodes[number], store.card.record
    assert info.seed is not None
    states, actions = store.state(number), _executed(store, number)
    observation = env.reset(info.task, info.seed)
    apart = np.zeros(info.length)
    success = False
    for step in range(info.length):
        apart[step] = float(np.abs(observation.state - states[step]).max())
        observation, success, over = env.step(actions[step], render=False)
        if over and step + 1 < info.length:
            raise SimulationError(
                f"episode {info.id!r}: the simulation ended after {step + 1} of {info.length} steps; allow "
                "more (horizon)"
            )
    far = np.flatnonzero(~(apart <= NEAR))
    filtered = record is not None or bool(store.card.episodes.success)
    return Replayed(
        info.id,
        info.length,
        True if filtered else None,  # `vlafit record` keeps successes only, and the filter of a card, too
        success,
        float(apart.max()),
        float(apart[-1]),
        int(far[0]) if len(far) else None,
    )


def _executed(store: EpisodeStore, number: int) -> np.ndarray:
    """Return the actions [T, a] that the simulation got: labels, plus the pushes of a disturbed episode."""
    info, record = store.episodes[number], store.card.record
    actions = store.actions(number)
    if record is None or not record.perturbed:
        return actions
    assert info.seed is not None
    offsets = pushes(record, info.task, info.seed, _longest(record))[: info.length]
    return disturbed(actions, offsets, store.card.robot.control)


def _longest(record: RecordSpec) -> int:
    return record.horizon + record.hold_steps  # pushes are drawn for so many steps
