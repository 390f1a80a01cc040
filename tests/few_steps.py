"""Sample actions in 2 Euler steps instead of 10, in this process and in those that `tests.forked` starts.

Validation took 38 % of the CPU of a test's training run, nearly all of it for Euler steps; what is checked
about a run does not depend on their number. Tests of sampling itself keep the default.
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

NAME = "TESTS_SAMPLE_IN_STEPS"  # the environment's word for it
STEPS = 2


def sample_in_few_steps(patch: "pytest.MonkeyPatch") -> None:
    """Until `patch` is undone."""
    from vlafit.nn.flow_policy import FlowPolicy

    patch.setenv(NAME, str(STEPS))
    patch.setattr(FlowPolicy, "steps", STEPS)


def follow_environment() -> None:
    """Do as the process does that started this one."""
    if NAME in os.environ:
        from vlafit.nn.flow_policy import FlowPolicy

        FlowPolicy.steps = int(os.environ[NAME])
