"""What each process of a launch runs in the tests: several recipes, one after another, joined anew for each.

Importing torch takes longer than training; so the processes are started once for all.
"""

import json
import os
import sys
from pathlib import Path

from accelerate.state import AcceleratorState

from tests import few_steps
from vlafit import config
from vlafit.recipe import Recipe
from vlafit.train import run


def main() -> None:
    """Carry out the jobs of a JSON file: {"recipe": path, "out": path, "environ": variables of the job}."""
    few_steps.follow_environment()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        os.environ.update(job["environ"])
        run(config.read(Recipe, Path(job["recipe"]), "recipe"), Path(job["out"]), resume=True)
        AcceleratorState._reset_state(reset_partial_state=True)
        for name in job["environ"]:
            del os.environ[name]


if __name__ == "__main__":
    main()
