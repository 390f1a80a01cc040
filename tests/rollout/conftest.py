from collections.abc import Callable

import pytest

from vlafit.envs import EnvSpec
from vlafit.rollout import Protocol

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
