"""The unit in which an offline evaluation is asked, saved and resumed: some observations of one episode."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlafit import files
from vlafit.datasets import EpisodeStore
from vlafit.errors import ConfigError, DataError, EmbodimentError
from vlafit.execution import executable
from vlafit.offline.baselines import HoldStill, MeanChunk
from vlafit.offline.inputs import blank
from vlafit.types import Actor, EpisodeKey, Observation

Array = NDArray[np.float32]
NUMBERS = -1  # in `Part.valid`: the policy answers with numbers


@dataclass(frozen=True, eq=False)
class Part:
    """Recorded, predicted and baseline actions at n steps of an episode.

    k draws of noise, t steps of the chunk, a action dimensions, c blanked inputs. Actions are in the robot's
    units. A baseline that does not apply is NaN. Of a policy that writes tokens, `valid` says which answers
    were a chunk of actions: 1 or 0; -1 where it answers with numbers, and in files of an earlier version.
    """

    steps: NDArray[np.int64]  # [n]
    states: Array  # [n, s]
    recorded: Array  # [n, t, a]; past the episode's end the last action is repeated
    is_real: NDArray[np.bool_]  # [n, t]
    predicted: Array  # [n, k, t, a]
    blanked: Array  # [c, n, t, a] the first draw with one input blanked
    hold_still: Array  # [n, t, a]
    mean_chunk: Array  # [t, a]
    valid: NDArray[np.int8]  # [n, k]
    blanked_valid: NDArray[np.int8]  # [c, n]

    def save(self, path: Path) -> None:
        """Write the arrays as a .npz file."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **vars(self))
        files.write_atomic(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> "Part":
        """Read what `save` wrote. Raises ConfigError for a damaged file."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                stored: dict[str, Any] = dict(arrays)
            for name, of in (("valid", "predicted"), ("blanked_valid", "blanked")):
                stored.setdefault(name, np.full(stored[of].shape[:2], NUMBERS, np.int8))
            return cls(**{name: stored[name] for name in cls.__dataclass_fields__})
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise ConfigError(
                f"{path}: damaged ({error}); remove this file, and evaluate again with --resume"
            ) from error
        except Exception as error:  # zipfile's and zlib's own errors
            if type(error).__module__ not in ("zipfile", "zlib"):
                raise
            raise ConfigError(
                f"{path}: damaged ({error}); remove this file, and evaluate again with --resume"
            ) from error


def ask(
    actor: Actor,
    store: EpisodeStore,
    episode: str,
    steps: Sequence[int],
    *,
    draws: int,
    seed: int,
    history: int,
    blanked: Sequence[str],
    mean_state: Array,
    hold: HoldStill | None,
    mean: MeanChunk,
) -> Part:
    """Ask `actor` for its chunks at `steps` of an episode, with `draws` seeds of noise each.

    The first draw is asked once more with each input in `blanked` blanked. Raises DataError where the actor
    answers with chunks of several lengths, or not finite.
    """
    number = store.index(episode)
    seen = [store.sample(number, step, 1, history).observation for step in steps]
    keys = [
        [EpisodeKey(seed + draw, f"{store.card.name}/{episode}", step) for step in steps]
        for draw in range(draws)
    ]
    observations = [observation for _ in range(draws) for observation in seen]
    changed = [[blank(observation, name, mean_state) for observation in seen] for name in blanked]
    everything: list[Observation] = [*observations, *(o for row in changed for o in row)]
    every_key = [key for row in keys for key in row] + keys[0] * len(blanked)
    answered = actor.act(everything, every_key)
    width = store.embodiment.action.shape[0]
    try:
        chunks = [executable(chunk.actions, width) for chunk in answered]
    except EmbodimentError as error:
        raise DataError(f"{store.card.name}, episode {episode}: {error}") from error
    lengths = sorted({len(chunk) for chunk in chunks})
    if len(lengths) > 1:
        raise DataError(
            f"{store.card.name}: the policy answers with chunks of {lengths} steps; all must have one length"
        )
    answers = np.stack(chunks)
    valid = np.array([NUMBERS if one.valid is None else one.valid for one in answered], np.int8)
    chunk, count = answers.shape[1], len(steps)
    rows = np.asarray(steps)[:, None] + np.arange(chunk)
    actions, states = store.actions(number), store.state(number)[list(steps)]
    still = np.full((count, chunk, width), np.nan, np.float32)
    if hold is not None:
        still[:] = hold.action(states, width)[:, None]
    return Part(
        steps=np.asarray(steps, np.int64),
        states=np.asarray(states, np.float32),
        recorded=actions[np.minimum(rows, len(actions) - 1)],
        is_real=rows < len(actions),
        predicted=answers[: draws * count].reshape(draws, count, chunk, width).swapaxes(0, 1),
        blanked=answers[draws * count :].reshape(len(blanked), count, chunk, width),
        hold_still=still,
        mean_chunk=mean.without(episode, chunk),
        valid=valid[: draws * count].reshape(draws, count).swapaxes(0, 1),
        blanked_valid=valid[draws * count :].reshape(len(blanked), count),
    )
