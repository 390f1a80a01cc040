"""Whether the statistics that a dataset's own files state (meta/stats.json) are those of its rows."""

from vlafit.datasets import recorded
from vlafit.datasets.checks.catalogue import Untested
from vlafit.datasets.checks.finding import Finding
from vlafit.datasets.store import EpisodeStore
from vlafit.errors import DataError


def check_recorded(store: EpisodeStore, untested: Untested) -> list[Finding]:
    """Return a finding for each column whose stated statistics are not those of the rows."""
    stated = store.recorded_statistics()
    if not stated.columns:
        untested.add("stale_statistics", stated.reason or f"{stated.file} states none of these columns")
    try:
        stale = recorded.differences(store, stated)
    except DataError:  # a value that is not finite, which is a finding of its own
        untested.add("stale_statistics", "values are not finite")
        return []
    return [
        Finding(
            "warning",
            "stale_statistics",
            "",
            None,
            f"{stated.file} states {difference.text}",
            "none here, where statistics are taken of the rows; programs that trust the file normalise by "
            "other values",
            "compute the file's statistics again",
        )
        for difference in stale
    ]
