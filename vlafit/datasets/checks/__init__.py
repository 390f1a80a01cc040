"""Check recorded episodes for what opens without an error and spoils training."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from vlafit.datasets.checks.beside import check_beside
from vlafit.datasets.checks.catalogue import TESTS, NotTested, Untested, together
from vlafit.datasets.checks.columns import check_columns
from vlafit.datasets.checks.declared import check_declared
from vlafit.datasets.checks.finding import Finding
from vlafit.datasets.checks.forms import check_forms
from vlafit.datasets.checks.pixels import PIXEL_TESTS, check_pixels
from vlafit.datasets.checks.recorded import check_recorded
from vlafit.datasets.checks.success import check_success
from vlafit.datasets.selection import LeftOut
from vlafit.datasets.store import EpisodeStore

__all__ = ["TESTS", "Checked", "Finding", "NotTested", "check_declared", "check_store", "together"]


@dataclass(frozen=True)
class Checked:
    """What a check came to."""

    findings: tuple[Finding, ...]
    """What is suspicious, errors first, then by episode."""
    not_tested: tuple[NotTested, ...]
    """The tests that could not run, and why."""
    left_out: tuple[LeftOut, ...] = ()
    """The episodes that were not checked because the dataset was opened without them."""

    def facts(self, dataset: str) -> dict[str, Any]:
        """Return all as JSON has them."""
        return {
            "dataset": dataset,
            "errors": sum(finding.severity == "error" for finding in self.findings),
            "findings": [asdict(finding) for finding in self.findings],
            "not_tested": [asdict(test) for test in self.not_tested],
            "left_out": {one.id: one.reason for one in self.left_out},
        }


def check_store(
    store: EpisodeStore, *, pixels: bool = True, progress: Callable[[int, int], None] | None = None
) -> Checked:
    """Return what is suspicious in a dataset, and which tests could not run.

    `pixels` False looks at columns only, and decodes no frame. `progress` is called with the frames done and
    their number, of all cameras. Raises DataError where the files cannot be read.
    """
    untested = Untested()
    for name, column in (("state", store.card.robot.state), ("action", store.card.robot.action)):
        if not column.labels:
            untested.add("repeated_names", "its dimensions have no names", name)
    findings = [*check_declared(store), *check_forms(store, untested)]
    findings += check_success(store, untested)
    findings += [*check_columns(store, untested), *check_recorded(store, untested)]
    if pixels:
        findings += [*check_beside(store, untested), *check_pixels(store, progress, untested=untested)]
    else:
        for test in ("channel_order_beside", *PIXEL_TESTS):
            untested.add(test, "no frame was looked at (--no-pixels)")
    order = {"error": 0, "warning": 1}
    findings.sort(key=lambda f: (order[f.severity], f.kind, f.episode, f.step or 0))
    return Checked(tuple(findings), untested.listed(), store.left_out)
