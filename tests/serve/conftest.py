from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.serve.robots import Summing, described
from vlafit.serve.options import Options
from vlafit.serve.server import Running, serving

Serve = Callable[..., Running]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serves an actor on a free port until the test ends; options are those of `Options`."""
    with ExitStack() as stack:

        def start(actor: Summing | None = None, **options: object) -> Running:
            actor = actor or Summing()
            values = {"port": 0, **options}
            return stack.enter_context(serving(actor, described(actor), Options(**values)))  # type: ignore[arg-type]

        yield start
