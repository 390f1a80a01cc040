"""Which parts of a policy learn, how fast and when: strategies, and their resolution into plans.

adapters.py and rules.py say what a rule may ask for, strategy.py how that is written and in which stages,
plan.py what it comes to for one policy, apply.py puts that into force; inject.py puts adapters in, merge.py
takes them out again.
"""

from vlafit.tuning.adapters import Adapter
from vlafit.tuning.apply import apply, apply_strategy, enter, preview, restore
from vlafit.tuning.plan import Entry, Plan, Row
from vlafit.tuning.rules import Rule, Select
from vlafit.tuning.strategy import Moment, Stage, Strategy, load_strategy, parse

__all__ = [
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
