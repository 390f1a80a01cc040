"""Ask a policy for its chunks on recorded observations, and measure their distance from what was recorded."""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlafit import arguments, locks
from vlafit.agreement import Item
from vlafit.datasets import EpisodeStore, episodes_hash
from vlafit.errors import ConfigError, ranges
from vlafit.offline.baselines import HoldStill, MeanChunk, hold_still, spread_of_actions
from vlafit.offline.episodes import Episodes
from vlafit.offline.folder import OfflineFolder
from vlafit.offline.inputs import inputs_of, read_by
from vlafit.offline.numbers import Measured, summarise
from vlafit.offline.part import Part, ask
from vlafit.offline.strips import write_strip
from vlafit.requests import expected_of
from vlafit.types import Actor

LOCKED_BY = "vlafit eval --data"  # in messages about a folder that is in use
PART = 8  # observations that are asked and saved together
WIDTH = 16  # observations in a batch of a local policy, which decides the last bits of its actions
Progress = Callable[[int, int, str], None]
"""Called with (observations that are answered, all observations, a text about the newest)."""


@dataclass(frozen=True)
class Settings:
    """How much is measured. The same settings always choose the same observations and noise."""

    samples: int = 64
    """Observations, evenly spread over the episodes, and at least two of each: too many episodes for that are
    thinned out evenly."""
    draws: int = 8
    """Seeds of noise for each observation."""
    seed: int = 0
    """The first seed of noise."""
    inputs: bool = True
    """Whether to blank each input in turn."""
    strips: int = 2
    """Episodes with a film strip and curves."""

    def __post_init__(self) -> None:
        """Raise ConfigError naming the argument, its value and what is allowed."""
        limits = {"samples": (1, 10**6), "draws": (2, 2**12), "seed": (0, 2**62), "strips": (0, 10**6)}
        for name, (least, most) in limits.items():
            value = arguments.whole(f"evaluation: {name}", getattr(self, name), least, most)
            object.__setattr__(self, name, value)
        object.__setattr__(self, "inputs", arguments.flag("evaluation: inputs", self.inputs))


def evaluate(
    actor: Actor,
    store: EpisodeStore,
    episodes: Episodes,
    out: Path,
    settings: Settings = Settings(),
    *,
    identity: str,
    history: int = 1,
    resume: bool = False,
    progress: Progress | None = None,
    agreement: Sequence[Item] = (),
) -> dict[str, Any]:
    """Evaluate `actor` on recorded episodes in the folder `out`; return what result.json holds.

    Only the contract of an Actor is used, so any policy can be measured. `identity` names it (a checkpoint's
    hash, say): an evaluation resumes only with the same one. `history` is how many observed steps it reads.
    `agreement` is what policy and dataset say of one another, which the result keeps.
    The result does not depend on interruptions. Raises ConfigError for another evaluation in `out`.
    """
    started = time.monotonic()
    episodes = _spread(episodes, settings.samples)
    robot = store.embodiment
    learned = episodes.training or tuple(info.id for info in store.episodes)
    deviation = spread_of_actions((store.actions(store.index(i)) for i in learned), robot.action)
    hold = hold_still(store, learned, deviation)
    read = read_by(expected_of(actor, robot))
    blanked = tuple(name for name in inputs_of(robot) if name in read) if settings.inputs else ()
    mean_state = np.mean([store.state(store.index(i)).mean(axis=0) for i in learned], axis=0)
    mean = MeanChunk(store, learned)
    folder = OfflineFolder(
        Path(out),
        {
            "actor": identity,
            "dataset": store.card.name,
            "data_sha256": episodes_hash(store, episodes.training, episodes.evaluated),
            "episodes": list(episodes.evaluated),
            "training_episodes": list(episodes.training),
            "settings": asdict(settings),
            "history": history,
            "inputs": list(blanked),
        },
    )
    with locks.exclusive(folder.path, LOCKED_BY):
        folder.open(resume)
        folder.tidy()
        wanted = list(_parts(store, episodes, settings.samples))
        total, done = sum(len(steps) for _, _, steps in wanted), 0
        parts: dict[str, list[Part]] = {}
        for episode, number, steps in wanted:
            part = folder.finished(episode, number)
            if part is not None:
                _require_of(part, store, episode, steps, folder.part(episode, number))
            if part is None:
                part = ask(
                    actor, store, episode, steps, draws=settings.draws, seed=settings.seed, history=history,
                    blanked=blanked, mean_state=mean_state.astype(np.float32),
                    hold=hold if isinstance(hold, HoldStill) else None, mean=mean,
                )  # fmt: skip
                part.save(folder.part(episode, number))
            parts.setdefault(episode, []).append(part)
            done += len(steps)
            if progress:
                progress(done, total, episode)
        for name in episodes.evaluated[: settings.strips]:
            write_strip(folder.path, store, name)
        measured = Measured(parts, deviation, robot.action, blanked)
        result = summarise(measured) | {
            "robot": robot.name,
            "hz": robot.hz,
            "chosen": episodes.why,
            "measured_over": _measured_over(measured, settings, episodes.training, len(learned), identity),
            "hold_still": hold.why if isinstance(hold, HoldStill) else hold,
            "mean_chunk": "of the training episodes" if episodes.training else "of all other episodes",
            "not_read": [name for name in inputs_of(robot) if name not in read],
            "agreement": [item.to_json() for item in agreement],
            "notices": _notices(episodes),
            "seconds": round(time.monotonic() - started, 1),
        }
        folder.finish(result)
        return folder.identity | result


def _measured_over(
    measured: Measured, settings: Settings, training: Sequence[str], learned: int, identity: str
) -> str:
    """Return what the errors are means over. Numbers over other observations or draws differ."""
    observations, count = sum(len(episode.steps) for episode in measured.episodes), len(measured.episodes)
    draws, last = settings.draws, settings.seed + settings.draws - 1
    sampled = re.search(r" steps=(\d+)", identity)  # in the fingerprint of a policy that samples in steps
    return (
        f"{observations} observations of {count} episode{'s' * (count != 1)}, {draws} draws of noise each "
        f"(seeds {settings.seed} to {last})"
        + (f", sampled in {sampled[1]} steps" if sampled else "")
        + f"; standard deviations over {'the training' if training else 'all'} episodes ({learned})"
    )


def _require_of(part: Part, store: EpisodeStore, episode: str, steps: Sequence[int], path: Path) -> None:
    """Raise ConfigError unless a part that was answered earlier is of these steps of this episode."""
    states = store.state(store.index(episode))[list(steps)].astype(np.float32)
    if part.steps.tolist() != list(steps) or not np.array_equal(part.states, states, equal_nan=True):
        raise ConfigError(
            f"{path}: holds other samples than steps {ranges(steps)} of episode {episode!r}; remove this "
            "file, and evaluate again with --resume"
        )


def _spread(episodes: Episodes, samples: int) -> Episodes:
    """Return evenly spaced ones of the episodes, if there are too many for two observations of each."""
    most, every = max(1, samples // 2), episodes.evaluated
    if len(every) <= most:
        return episodes
    chosen = tuple(every[(2 * i + 1) * len(every) // (2 * most)] for i in range(most))
    why = f"{episodes.why} {most} of {len(every)}, evenly spaced; --samples {2 * len(every)} takes all."
    return replace(episodes, evaluated=chosen, why=why)


def _parts(store: EpisodeStore, episodes: Episodes, samples: int) -> Iterator[tuple[str, int, list[int]]]:
    """Yield (episode, number of the part, steps): evenly spaced steps of every episode, in small groups."""
    each = max(1, samples // len(episodes.evaluated))
    for identity in episodes.evaluated:
        length = store.episodes[store.index(identity)].length
        count = min(each, length)
        steps = [(2 * i + 1) * length // (2 * count) for i in range(count)]
        for number, begin in enumerate(range(0, count, PART)):
            yield identity, number, steps[begin : begin + PART]


def _notices(episodes: Episodes) -> list[str]:
    notices = []
    if episodes.learned:
        notices.append(
            "The policy learned from some of these episodes: its error here says nothing about new ones."
        )
    if len(episodes.evaluated) == 1:
        notices.append(
            "One episode: how much the error varies between episodes is unknown, so no interval is given."
        )
    elif len(episodes.evaluated) < 5:
        notices.append(f"Only {len(episodes.evaluated)} episodes: the intervals are wide because of that.")
    return notices
