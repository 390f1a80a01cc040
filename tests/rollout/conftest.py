from collections.abc import Callable

import pytest

from vlafit.envs import EnvSpec
from vlafit.rollout import Protocol, Result

TOY = "tests.rollout.toy_env"


def make_protocol(*tasks: str, trials: int = 4, **others: object) -> Protocol:
    values: dict[str, object] = {
        "name": "toy",
        "env": EnvSpec(TOY, size=16),
        "tasks": tasks or ("left", "right"),
        "trials": trials,
        "first_seed": 100,
        "horizon": 20,
        "replan": 4,
        "swapped": {"left": "right", "right": "left"} if not tasks else {},
    }
    return Protocol(**(values | others))  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def make() -> Callable[..., Protocol]:
    """As `protocol`, for fixtures that a module shares."""
    return make_protocol


@pytest.fixture
def protocol() -> Callable[..., Protocol]:
    """Makes protocols on the toy environment; tasks left and right, unless others are named."""
    return make_protocol


FAULTS = {
    "raise": "the dot fell off the line",
    "die": "ended by SIGKILL",
    "hang": "did not answer within 1 s",
    "text": "state: must be float32 [2], is <U1",
}
"""Tasks of the toy that fail -> what their errors say, of processes that have a second to answer."""


def require_errors_of_their_tasks(got: Result) -> None:
    """Raise AssertionError unless exactly the tasks of `FAULTS` have errors, each its own."""
    errors = {record.task: record.error for record in got.records if record.error}
    assert errors.keys() == FAULTS.keys()
    assert all(fact in (errors[task] or "") for task, fact in FAULTS.items())
