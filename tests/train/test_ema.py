"""The average of copies in several processes is kept once, in shares; whole runs: test_two_processes."""

from dataclasses import replace

import pytest

from vlafit.policies import build_family
from vlafit.train.ema import owners
from vlafit.train.forecast import Workload, without_step
from vlafit.tuning import load_strategy


def test_every_average_has_one_owner_and_all_keep_about_as_much() -> None:
    sizes = {f"layer.{number}": 100 - number for number in range(40)} | {"table": 700}
    owned = owners(sizes, 4)
    assert owned.keys() == sizes.keys()
    held = [sum(sizes[name] for name in owned if owned[name] == rank) for rank in range(4)]
    assert max(held) - min(held) <= 100  # the last that is given away goes to who has least


def test_what_goes_on_to_learn_stays_where_it_is() -> None:
    before = owners({"a": 5, "b": 4, "c": 3}, 2)
    after = owners({"b": 4, "c": 3, "new": 9}, 2, {name: before[name] for name in ("b", "c")})
    assert {name: after[name] for name in ("b", "c")} == {name: before[name] for name in ("b", "c")}
    assert owners({"b": 4, "c": 3, "new": 9}, 2, {"b": 0, "c": 0})["new"] == 1


@pytest.mark.parametrize("name", ["full", "lora"])
def test_the_forecast_counts_the_largest_share(name: str) -> None:
    policy, strategy = build_family("pi0", "pi0-small", device="meta"), load_strategy(name)
    alone = Workload(4, precision="fp32", frozen="fp32", ema=True)
    whole = without_step(policy, strategy, alone).average
    shares = [
        without_step(policy, strategy, replace(alone, processes=processes)).average for processes in (2, 8)
    ]
    largest = 4 * max(p.numel() for p in policy.parameters())
    for share, processes in zip(shares, (2, 8), strict=True):
        assert whole / processes <= share <= whole / processes + largest
