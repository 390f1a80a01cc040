"""Counters and histograms of a server, written in Prometheus' text format."""

import threading
from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass, field

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
ROWS = (1, 2, 4, 8, 16, 32, 64)


@dataclass
class Histogram:
    """Counts by upper bound, their sum and number."""

    help: str
    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def lines(self, name: str) -> list[str]:
        """Return the histogram's lines."""
        lines = [f"# HELP {name} {self.help}", f"# TYPE {name} histogram"]
        below = 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            below += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {below}')
        return [*lines, f"{name}_sum {self.total:.6f}", f"{name}_count {below}"]


class Metrics:
    """Counters of a server. The server's event loop writes it; any thread may read."""

    def __init__(self) -> None:
        self.clients = 0
        self.answered: dict[str, int] = defaultdict(int)  # requests by protocol
        self.refused: dict[str, int] = defaultdict(int)  # frames and connections by reason
        self.warned: dict[str, int] = defaultdict(int)  # sentences to clients by what they are about
        self.request = Histogram("Seconds from a request's frame to its answer.", SECONDS)
        self.queue = Histogram("Seconds that an observation waited for the policy.", SECONDS)
        self.act = Histogram("Seconds of one call of the policy.", SECONDS)
        self.rows = Histogram("Observations in one call of the policy.", ROWS)
        self._lock = threading.Lock()

    def answer(self, protocol: str, seconds: float) -> None:
        """Count an answered request."""
        with self._lock:
            self.answered[protocol] += 1
            self.request.add(seconds)

    def refuse(self, reason: str) -> None:
        """Count what was refused."""
        with self._lock:
            self.refused[reason] += 1

    def warn(self, about: str, count: int) -> None:
        """Count warnings to a client."""
        with self._lock:
            self.warned[about] += count

    def call(self, seconds: float, waited: list[float]) -> None:
        """Count one call of the policy for observations that `waited` so many seconds each."""
        with self._lock:
            self.act.add(seconds)
            self.rows.add(len(waited))
            for one in waited:
                self.queue.add(one)

    def text(self) -> str:
        """Return everything in Prometheus' text format, version 0.0.4."""
        with self._lock:
            lines = ["# HELP vlafit_clients Open connections.", "# TYPE vlafit_clients gauge"]
            lines.append(f"vlafit_clients {self.clients}")
            for name, help_text, label, counts in (
                ("vlafit_requests_total", "Answered requests.", "protocol", self.answered),
                ("vlafit_refused_total", "Refused frames and connections.", "reason", self.refused),
                (
                    "vlafit_warnings_total",
                    "Cameras missing, states far outside, answers that are no chunk.",
                    "about",
                    self.warned,
                ),
            ):
                lines += [f"# HELP {name} {help_text}", f"# TYPE {name} counter"]
                lines += [f'{name}{{{label}="{key}"}} {count}' for key, count in sorted(counts.items())]
            lines += self.request.lines("vlafit_request_seconds")
            lines += self.queue.lines("vlafit_queue_seconds")
            lines += self.act.lines("vlafit_act_seconds")
            lines += self.rows.lines("vlafit_batch_rows")
        return "\n".join(lines) + "\n"
