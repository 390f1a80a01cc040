"""Parameters of a test whose variants run the same code: some always, the others with `make test-all`."""

from collections.abc import Iterable
from typing import Any

import pytest


def variants(names: Iterable[Any], always: Iterable[Any]) -> list:
    """Return `names` as parameters of a test; those that are not in `always` are marked slow."""
    names, always = list(names), list(always)
    missing = [name for name in always if name not in names]
    if missing:
        raise ValueError(f"no variants of this test: {', '.join(map(str, missing))}")
    return [name if name in always else pytest.param(name, marks=pytest.mark.slow) for name in names]
