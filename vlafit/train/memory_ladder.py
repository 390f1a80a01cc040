"""Find settings whose forecast fits a memory: the rungs of a ladder, from the fastest to the smallest.

A rung is a way to recompute, AdamW's moments in fp32 or 8 bits, and a number of micro-batches. Their order
is that of an estimate of their cost, not of a measurement: recompute repeats up to a third of a step's
arithmetic, and few rows leave a GPU idle. Trained weights in bf16, and optimiser steps in the backward pass,
come after all of those whatever they cost, because they change how a run learns.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from vlafit.errors import ConfigError
from vlafit.nn.policy import Policy
from vlafit.nn.recompute import Recompute
from vlafit.train.adam8bit import States
from vlafit.train.forecast import Forecast, Workload, forecast, without_step
from vlafit.tuning import Strategy

CARDS_GB = (16, 24, 48, 80, 141)
FIXED = 800 * 10**6  # of a GPU's driver and libraries: an assumption, not measured
FRAGMENTED = 1.05  # what an allocator holds over what tensors hold: an assumption, not measured
SLOWER = {"none": 1.0, "selective": 1.05, "full": 1.33}  # full repeats the forward pass, a third of a step
SLOWER_STATES: Mapping[States, float] = {"fp32": 1.0, "8bit": 1.05, "cpu": 4.0}
"""cpu: 16 bytes a parameter at some 25 GB/s, an assumption; so no rung is on it that was not asked for."""
FEW_ROWS = 4  # below this many a GPU is taken to be idle for part of the time
IGNORE = "ignore"


@dataclass(frozen=True)
class Rung:
    """One way to spend less memory."""

    recompute: Recompute = "none"
    states: States = "fp32"
    micro_batches: int = 1
    trained: Literal["fp32", "bf16"] = "fp32"
    """How matrices that are trained are kept: `train.weights`."""
    in_backward: bool = False

    @property
    def options(self) -> str:
        """Return it as options of `vlafit train`."""
        words = [f"--train.recompute {self.recompute}", f"--optim.states {self.states}"]
        words += [f"--train.accumulate {self.micro_batches}"]
        words += ["--train.weights bf16"] if self.trained == "bf16" else []
        words += ["--optim.in_backward true"] if self.in_backward else []
        return " ".join(words)

    @property
    def changes(self) -> int:
        """Return how much it changes how a run learns: 0 nothing, 1 rounding, 2 clipping, 3 both."""
        return (self.trained == "bf16") + 2 * self.in_backward

    def is_possible(self, workload: Workload, strategy: Strategy) -> bool:
        """Tell whether a run of the workload can be on this rung; `train/preflight.py` refuses others."""
        if self.in_backward and (self.micro_batches > 1 or workload.processes > 1 or strategy.lowers_ranks):
            return False
        if self.trained == "bf16" and workload.precision != "bf16":
            return False
        return workload.shards == 1 or (self.states, self.changes) == ("fp32", 0)

    def cost(self, rows: int) -> float:
        """Return the estimated time of a step of `rows`, relative to the fastest rung."""
        few = max(1.0, (FEW_ROWS / max(1, rows // self.micro_batches)) ** 0.5)
        split = 1 + 0.01 * (self.micro_batches - 1).bit_length()
        return SLOWER[self.recompute] * SLOWER_STATES[self.states] * few * split


Forecaster = Callable[[Rung], Forecast]


def room_for(gigabytes: float, on_cpu: bool = False) -> int:
    """Return the bytes of tensors that fit a card, or a CPU's memory, of so many GB (10^9 bytes)."""
    return int((gigabytes * 10**9 - (0 if on_cpu else FIXED)) / FRAGMENTED)


def parse_memory(text: str) -> float | None:
    """Return the gigabytes of `train.memory`; None where it names none. Raises ConfigError otherwise."""
    if text in ("", IGNORE):
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*GB", text, re.IGNORECASE)
    if match is None or not float(match[1]):
        raise ConfigError(f'train.memory {text!r}: write the memory of a GPU such as "24GB", or "{IGNORE}"')
    return float(match[1])


def rungs(
    workload: Workload, strategy: Strategy, *, fixed: Rung | None = None, free: Sequence[str] = ()
) -> list[Rung]:
    """Return the rungs that are possible for a workload, the fastest first.

    With `fixed` only the fields named in `free` differ from it.
    """
    rows = workload.rows
    splits = [n for n in range(1, rows + 1) if rows % n == 0 and (n & (n - 1) == 0 or n == rows)]
    states_of: tuple[States, ...] = ("fp32", "8bit")
    if fixed is not None and fixed.states == "cpu":
        states_of = ("cpu",)
    every = [
        Rung(recompute, states, split, trained, in_backward)
        for recompute in ("none", "selective", "full")
        for states in states_of
        for split in splits
        for trained in ("fp32", "bf16")
        for in_backward in (False, True)
    ]
    every = [rung for rung in every if rung.is_possible(workload, strategy)]
    if fixed is not None:
        held = [name for name in vars(fixed) if name not in free]
        every = [rung for rung in every if all(getattr(rung, n) == getattr(fixed, n) for n in held)]
        every = every or [fixed]
    return sorted(every, key=lambda rung: (rung.changes, rung.cost(rows)))


def forecaster(policy: Policy, strategy: Strategy, workload: Workload) -> Forecaster:
    """Return the forecast of a rung, from steps with one row and with the most rows.

    A peak is the largest of several sums that each grow linearly with the rows. So it is convex, and what
    lies between two numbers of rows is at most what a line between them says.
    """

    @cache
    def step(rung: Rung, rows: int) -> Forecast:
        changed = replace(
            workload,
            recompute=rung.recompute,
            micro_batches=rung.micro_batches,
            rows=rows * rung.micro_batches,
            states="fp32",
            trained=rung.trained,
            in_backward=rung.in_backward,
        )
        return forecast(policy, strategy, changed)

    @cache
    def other_states(states: States) -> Forecast:
        return without_step(policy, strategy, replace(workload, states=states))

    def of(rung: Rung) -> Forecast:
        rows = max(1, workload.rows // rung.micro_batches)
        # The second micro-batch has all gradients beside it, and so have all after it.
        like = replace(rung, states="fp32", micro_batches=min(2, rung.micro_batches))
        most = max(1, workload.rows // like.micro_batches)
        made = step(like, most)
        if rows < most:
            one, share = step(like, 1), (rows - 1) / (most - 1)
            made = replace(
                made,
                activations=_between(one.activations, made.activations, share),
                step=_between(one.step, made.step, share),
            )
        if rung.states == "fp32":
            return made
        other = other_states(rung.states)
        return replace(made, optimiser=other.optimiser, update=other.update)

    return of


def _between(low: int, high: int, share: float) -> int:
    return round(low + share * (high - low))


def first_that_fits(
    candidates: Sequence[Rung], of: Forecaster, gigabytes: float, on_cpu: bool = False
) -> Rung | None:
    """Return the first rung whose forecast fits a card of so many GB; None if there is none.

    Of the rungs that change as much in how a run learns, those that recompute most are looked at first,
    because a forecast takes seconds.
    """
    room = room_for(gigabytes, on_cpu)
    for changes in sorted({rung.changes for rung in candidates}):
        alike = [rung for rung in candidates if rung.changes == changes]
        if any(of(rung).total <= room for rung in smallest(alike)):
            return next(rung for rung in alike if of(rung).total <= room)
    return None


def smallest(candidates: Sequence[Rung]) -> list[Rung]:
    """Return the rungs that recompute most, whatever else they do."""
    most = max(SLOWER[rung.recompute] for rung in candidates)
    return [rung for rung in candidates if SLOWER[rung.recompute] == most]


def gb(number: int) -> str:
    """Return bytes as GB (10^9 bytes), or below 0.1 GB as MB."""
    return f"{number / 1e9:.1f} GB" if number >= 10**8 else f"{number / 1e6:.1f} MB"
