import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import pytest

from tests.serve.robots import Summing, described
from vlafit.serve.options import Options
from vlafit.serve.server import Running, serving

Serve = Callable[..., Running]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serves an actor on a free port until the test ends; options are those of `Options`, and `changes` those
    of the actor's description."""
    with ExitStack() as stack:

        def start(
            actor: Summing | None = None, changes: Mapping[str, Any] | None = None, **options: object
        ) -> Running:
            actor = actor or Summing()
            said = dataclasses.replace(described(actor), **(changes or {}))
            values = {"port": 0, **options}
            return stack.enter_context(serving(actor, said, Options(**values)))  # type: ignore[arg-type]

        yield start
