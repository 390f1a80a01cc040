"""Opening a large checkpoint makes no second copy: the peak of anonymous memory, measured in a new process.

pi0 with every width divided by 8, 0.1 GB in bfloat16; at full size see benchmarks/load_memory.py and LOG.md.
"""

from pathlib import Path

import pytest

from benchmarks.load_memory import run, sizes

CONFIG = sizes(8)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "limit"), [("safetensors", 1.15), ("orbax", 1.5)])
def test_little_more_than_the_weights_is_held_while_a_file_is_loaded(form: str, limit: float, tmp_path: Path):
    found = run(tmp_path / "written", form, "bfloat16", CONFIG)
    assert found["load"]["weights"] > 1e8
    assert 0.9 < found["load"]["ratio"] < limit  # below 0.9 nothing was measured
    assert found["inspect"]["ratio"] < 0.05  # headers alone
