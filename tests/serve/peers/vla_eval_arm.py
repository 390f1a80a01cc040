"""A benchmark for `vla-eval run`: one robot that is always seen alike, four steps an episode.

It writes the actions that it is given, as hexadecimal bytes, into the file that ARM_ACTIONS names.
"""

import os

import numpy as np
from vla_eval.benchmarks.base import StepBenchmark, StepResult, repeat_last_hold
from vla_eval.specs import DimSpec

STEPS = 4


class Arm(StepBenchmark):
    def get_tasks(self):
        return [{"name": "pick", "suite": "arm"}]

    def reset(self, task):
        self.steps = 0
        return None

    def step(self, action):
        self.steps += 1
        with open(os.environ["ARM_ACTIONS"], "a") as file:
            file.write(np.asarray(action["actions"], np.float32).tobytes().hex() + "\n")
        return StepResult(None, 0.0, self.steps >= STEPS, {})

    def make_obs(self, raw_obs, task):
        rng = np.random.default_rng(0)
        images = {name: rng.integers(0, 256, (8, 8, 3), np.uint8) for name in ("front", "wrist")}
        state = rng.normal(size=3).astype(np.float32)
        return {"images": images, "task_description": "pick up the cube", "states": state.astype(np.float64)}

    def get_step_result(self, step_result):
        return {"success": self.steps == STEPS}

    def get_action_spec(self):
        return {"actions": DimSpec("actions", 3, "joints")}

    def get_observation_spec(self):
        return {"states": DimSpec("states", 3, "joints")}

    def get_hold_action(self, last_action):
        return repeat_last_hold(last_action, 3)
