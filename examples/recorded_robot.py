"""Drive a served policy by a robot that replays a recorded dataset as if it were live: no hardware is needed.

    vlafit serve CHECKPOINT &
    python examples/recorded_robot.py metaworld-faucet --url ws://127.0.0.1:8000

CARD is the data card that the policy was trained with, or the dataset's folder if it needs none. What the
policy would do is printed beside what was recorded.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import vlafit
from vlafit.datasets import EpisodeStore, load_card
from vlafit.errors import ConfigError, VlafitError
from vlafit.types import require_same


class RecordedRobot:
    """Shows the observations of one recorded episode, step by step, and keeps the actions that it is sent."""

    def __init__(self, store: EpisodeStore, episode: int) -> None:
        self.instruction = store.episodes[episode].instruction
        self.recorded = store.actions(episode)
        self.sent: list[NDArray[np.float32]] = []
        self._store, self._episode, self._states = store, episode, store.state(episode)

    def observations(self) -> Iterator[tuple[Mapping[str, Any], NDArray[np.float32]]]:
        """Yield (images, state) of each step."""
        for step, state in enumerate(self._states):
            cameras = self._store.embodiment.cameras
            yield {c.name: self._store.image(self._episode, step, c.name) for c in cameras}, state

    def send(self, action: NDArray[np.float32]) -> None:
        """Keep what a robot would execute."""
        self.sent.append(action)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("card", help="a data card, one that ships, or a dataset's folder")
    parser.add_argument("--url", default="ws://127.0.0.1:8000")
    parser.add_argument("--episode", type=int, default=0)
    parser.add_argument("--steps", type=int, default=0, help="steps to play [the whole episode]")
    parser.add_argument("--execution", choices=["chunk", "ensemble", "real_time"], default="chunk")
    parser.add_argument("--replan", type=int, default=4)
    parser.add_argument("--token-file", help="what the server asks for")
    parser.add_argument("--wait", type=float, default=60.0, help="seconds until the server must be there")
    options = parser.parse_args()

    store = vlafit.open_dataset(load_card(options.card))
    last = len(store.episodes) - 1
    if not 0 <= options.episode <= last:
        raise ConfigError(f"--episode {options.episode}: the dataset has episodes 0 to {last}")
    if options.steps < 0:
        raise ConfigError(f"--steps must be at least 0, not {options.steps}")
    token = Path(options.token_file).read_text() if options.token_file else ""
    robot = RecordedRobot(store, options.episode)
    execution = vlafit.Execution(options.execution, replan=options.replan)
    with (
        vlafit.connect(options.url, token=token, wait_s=options.wait) as policy,
        vlafit.Controller(policy, execution) as control,
    ):
        require_same(policy.embodiment, "the served policy", store.embodiment, f"dataset {store.card.name!r}")
        control.start(robot.instruction)
        for images, state in robot.observations():
            robot.send(control.step(images, state))
            if len(robot.sent) == options.steps:
                break
    error = np.abs(np.array(robot.sent) - robot.recorded[: len(robot.sent)]).mean(axis=0)
    labels = store.embodiment.action.labels or [str(i) for i in range(len(error))]
    print(f"{robot.instruction!r}: {len(robot.sent)} actions; mean distance from what was recorded:")
    width = max(map(len, labels))
    for label, value in zip(labels, error, strict=True):
        print(f"  {label:<{width}} {value:.4f} {store.embodiment.action.unit}".rstrip())


if __name__ == "__main__":
    try:
        main()
    except (VlafitError, OSError) as error:
        sys.exit(f"recorded_robot.py: {error}")
