"""Random corruptions of every layout's files: refused by name, or unchanged; nothing is silently another."""

from pathlib import Path

import pytest

from tests.datasets.corruptions import LAYOUTS, Written, read_corrupted, write
from tests.variants import variants

SEED = 7
EACH = 3  # of each layout, one in `make test`; `python -m tests.datasets.corruptions --count 300` reads more


@pytest.fixture(scope="module", params=LAYOUTS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write(request.param, tmp_path_factory.mktemp("set") / "set")


@pytest.mark.parametrize("number", variants(range(EACH), always=[0]))
def test_a_corrupted_file_is_named_or_its_samples_are_what_they_were(
    written: Written, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLAFIT_CACHE", "off")
    outcome = read_corrupted(written, SEED, number)
    assert not outcome.is_fault, outcome


@pytest.mark.slow
def test_a_restored_file_reads_as_before(written: Written) -> None:
    """The corruptions above leave no trace, so that each is judged by itself."""
    from tests.datasets.corruptions import compare, content
    from vlafit.datasets import open_dataset

    assert compare(written.content, content(open_dataset(written.card)), "none") == ("unchanged", "")


def test_a_camera_column_that_is_missing_from_a_parquet_file_is_named(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    from tests.datasets.corruptions import content
    from vlafit.datasets import open_dataset
    from vlafit.errors import DataError

    written = write("lerobot", tmp_path / "set")
    path = tmp_path / "set" / "data" / "chunk-000" / "file-001.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["observation.images.front"]), path)
    with pytest.raises(DataError, match=r"file-001\.parquet.*no column 'observation\.images\.front'"):
        content(open_dataset(written.card))
