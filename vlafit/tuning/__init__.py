"""Which parts of a policy learn, and how fast: strategies (rules.py) and their resolution (plan.py)."""

from vlafit.tuning.plan import Entry, Plan, Row, apply, apply_strategy, preview
from vlafit.tuning.rules import Rule, Select, Strategy, load_strategy, parse

__all__ = [
    "Entry",
    "Plan",
    "Row",
    "Rule",
    "Select",
    "Strategy",
    "apply",
    "apply_strategy",
    "load_strategy",
    "parse",
    "preview",
]
