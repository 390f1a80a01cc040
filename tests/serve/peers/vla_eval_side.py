"""Runs where vla-eval is installed: drives a server by vla-eval's own connection and episode runner.

python vla_eval_side.py URL OUTPUT.json
"""

import asyncio
import json
import sys

import numpy as np
from vla_eval.connection import Connection
from vla_eval.runners.sync_runner import SyncEpisodeRunner


class Arm:
    """What the runner needs of a benchmark: four steps of one robot, always the same picture."""

    def __init__(self):
        self.actions, self.steps = [], 0

    async def start_episode(self, task, recorder=None):
        self.steps = 0

    async def get_observation(self):
        rng = np.random.default_rng(0)
        images = {name: rng.integers(0, 256, (8, 8, 3), np.uint8) for name in ("front", "wrist")}
        state = rng.normal(size=3).astype(np.float32)
        return {"images": images, "task_description": "pick up the cube", "states": state.astype(np.float64)}

    async def apply_action(self, action):
        self.steps += 1
        self.actions.append(action["actions"])

    async def is_done(self):
        return self.steps >= 4

    async def get_time(self):
        return 0.0

    async def get_result(self):
        return {"success": True}


async def main(url, target):
    arm = Arm()
    async with Connection(url, max_retries=1) as connection:
        for episode in (5, 6):
            task = {"name": "pick", "suite": "arm", "episode_idx": episode}
            await SyncEpisodeRunner().run_episode(arm, task, connection, max_steps=10)
        try:
            await connection.act({"images": {}, "task_description": "pick", "states": np.zeros(3)})
            error = ""
        except RuntimeError as raised:
            error = str(raised)
        hello = connection.server_info
    with open(target, "w") as file:
        json.dump({"actions": [a.tobytes().hex() for a in arm.actions], "hello": hello, "error": error}, file)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
