"""Refuse a run that does not fit, naming changes whose own forecast does: the smallest change first.

Those that keep the numbers come first (recompute, moments in 8 bits, micro-batches), then bf16, then bf16
weights and steps in the backward pass, and where none of them fits another strategy, or shards over GPUs.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from vlafit.errors import ConfigError, StrategyError
from vlafit.nn.policy import Policy
from vlafit.train.forecast import Workload
from vlafit.train.memory_ladder import (
    IGNORE,
    Forecaster,
    Rung,
    first_that_fits,
    forecaster,
    gb,
    room_for,
    rungs,
    smallest,
)
from vlafit.tuning import Strategy, load_strategy

BF16 = "--train.precision bf16 --train.frozen bf16"
STRATEGIES = ("lora", "expert")
GPUS = (2, 4, 8)
NAMED = 2  # changes that a message names


@dataclass(frozen=True)
class Change:
    """A change of a run: options beside those of a rung, and the rungs that it may be on."""

    options: str
    candidates: Sequence[Rung]
    of: Forecaster
    same_strategy: bool = True

    def words(self, rung: Rung, own: Rung) -> str:
        """Return the options of the change on a rung."""
        return " ".join(filter(None, (self.options, "" if rung == own and self.options else rung.options)))


def changes(policy: Policy, strategy: Strategy, workload: Workload, own: Rung) -> Iterator[Change]:
    """Yield changes of a run of the workload on the rung `own`, the smallest first."""
    narrow = replace(workload, precision="bf16", frozen="bf16")
    plain, of = rungs(workload, strategy), forecaster(policy, strategy, workload)
    yield Change("", [rung for rung in plain if rung.changes == 0], of)
    if (workload.precision, workload.frozen) != ("bf16", "bf16"):
        in_bf16, of_bf16 = rungs(narrow, strategy), forecaster(policy, strategy, narrow)
        yield Change(BF16, [own], of_bf16)
        yield Change(BF16, [rung for rung in in_bf16 if rung.changes == 0], of_bf16)
        yield Change("", [rung for rung in plain if rung.changes], of)
        yield Change(BF16, [rung for rung in in_bf16 if rung.changes], of_bf16)
    else:
        yield Change("", [rung for rung in plain if rung.changes], of)
    few = (own, replace(own, recompute="full", states="8bit" if own.states == "fp32" else own.states))
    for options, load in (("", workload), (BF16, narrow))[: 1 + (workload != narrow)]:
        for name in STRATEGIES:
            other = load_strategy(name)
            words = " ".join(filter(None, (f"--strategy {name}", options)))
            every = [rung for rung in few if rung.is_possible(load, other)]
            yield Change(words, every, forecaster(policy, other, load), same_strategy=False)
    if workload.on_cpu or own.states != "fp32" or own.changes:
        return
    for count in (count for count in GPUS if count > workload.processes):
        rows = max(own.micro_batches, workload.rows * workload.processes // count)
        load = replace(workload, processes=count, shards=count, shards_weights=True, rows=rows)
        words = f"--train.sharding full on {count} GPUs"
        every = [own, replace(own, recompute="full")]
        yield Change(words, every, forecaster(policy, strategy, load), same_strategy=False)


def require_fit(
    own: Rung, of: Forecaster, every: Iterable[Change], gigabytes: float, where: str, *, on_cpu: bool
) -> None:
    """Raise ConfigError if the rung `own` does not fit by the forecast, naming changes that do."""
    need, room = of(own).total, room_for(gigabytes, on_cpu)
    if need <= room:
        return
    found: dict[str, int] = {}
    least: tuple[int, str] = (need, "")
    for change in every:
        if len(found) == NAMED or (found and not change.same_strategy):
            break
        if any(words.startswith(change.options) for words in found if change.options):
            continue  # found on its first rung
        try:
            rung = first_that_fits(change.candidates, change.of, gigabytes, on_cpu)
            if rung is not None:
                found[change.words(rung, own)] = change.of(rung).total
            for one in smallest(change.candidates) if change.candidates else []:
                least = min(least, (change.of(one).total, change.words(one, own)))
        except StrategyError:  # selects nothing of this policy
            continue
    if found:
        ways = [f"with {gb(total)}: {words}" for words, total in found.items()]
        remedy = f"this fits, by the forecast, {'; or '.join(ways)}"
    elif least[1]:
        remedy = (
            f"no setting lowers it below the room: the least, {gb(least[0])}, takes {least[1]}; take a "
            "smaller policy, or more memory"
        )
    else:
        remedy = "no setting lowers it: take a smaller policy, or more memory"
    raise ConfigError(
        f"the run does not fit {where}: forecast {gb(need)}, room {gb(max(0, room))} of "
        f"{gb(int(gigabytes * 10**9))}; {remedy}. To start all the same: --train.memory {IGNORE}"
    )
