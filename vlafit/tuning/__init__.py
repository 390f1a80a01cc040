"""Tuning strategies: which parts of a policy are trained, how fast and when.

`rules.py` and `adapters.py` define rules, `strategy.py` their stages, `strategy_toml.py` the TOML.
`resolution.py` matches rules to the tensors of a policy, `plan.py` holds the result, `apply.py` puts it into
force; `inject.py` adds adapters, `merge.py` folds them into the weights.
"""

from vlafit.tuning.adapters import Adapter
from vlafit.tuning.apply import (
    UNCHANGED,
    UNCHANGED_BF16,
    apply,
    apply_strategy,
    enter,
    preview,
    restore,
)
from vlafit.tuning.plan import Entry, Plan, Row
from vlafit.tuning.rules import Rule, Select
from vlafit.tuning.strategy import Moment, Stage, Strategy
from vlafit.tuning.strategy_toml import load_strategy, parse

__all__ = [
    "UNCHANGED",
    "UNCHANGED_BF16",
    "Adapter",
    "Entry",
    "Moment",
    "Plan",
    "Row",
    "Rule",
    "Select",
    "Stage",
    "Strategy",
    "apply",
    "apply_strategy",
    "enter",
    "load_strategy",
    "parse",
    "preview",
    "restore",
]
