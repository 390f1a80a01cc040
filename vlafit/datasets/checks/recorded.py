"""Whether the statistics that a dataset's own files state (meta/stats.json) are those of its rows."""

import numpy as np

from vlafit.datasets.checks.finding import Finding
from vlafit.datasets.store import EpisodeStore

TOLERANCE = 0.01  # of the range of a dimension; statistics are stored with fewer digits than rows
MEASURES = {"min": np.min, "max": np.max, "mean": np.mean, "std": np.std}


def check_recorded(store: EpisodeStore) -> list[Finding]:
    """Return a finding for each column whose stated statistics are not those of the rows."""
    findings = []
    for name, stated in store.recorded_statistics().items():
        read = store.state if name == "state" else store.actions
        rows = np.concatenate([read(number) for number in range(len(store.episodes))]).astype(np.float64)
        if not np.isfinite(rows).all():
            continue  # which is a finding of its own
        room = TOLERANCE * np.ptp(rows, axis=0) + 1e-6 * np.abs(rows).max()
        for measure, function in MEASURES.items():
            try:
                value = np.asarray(stated[measure], np.float64).reshape(rows.shape[1])
            except (KeyError, TypeError, ValueError):
                continue
            actual = function(rows, axis=0)
            bad = ~(np.abs(value - actual) <= room)
            if bad.any():
                d = int(bad.argmax())
                findings.append(
                    Finding(
                        "warning",
                        "stale_statistics",
                        "",
                        None,
                        f"meta/stats.json states {measure} {value[d]:.4g} of {name} dimension {d}, that of "
                        f"the rows is {actual[d]:.4g}; {int(bad.sum())} dimensions differ",
                        "none here, because statistics are taken of the rows; programs that trust the file "
                        "normalise by other values",
                        "compute the file's statistics again",
                    )
                )
                break
    return findings
