"""Significance of differences in success between policies that were evaluated from the same starts.

`paired` (test and interval of a pair, with starts as clusters over training seeds), `multiple` (Holm, and the
set of strategies that no other beats), `planning` (starts needed), `sequential` (stopping early at the same
error rate). Everything works on plain outcomes; nothing here imports torch.
"""

from vlafit.significance.multiple import best_set, holm
from vlafit.significance.paired import (
    Pairs,
    paired_interval,
    paired_t_p,
    sign_flip_p,
    two_way_interval,
)
from vlafit.significance.planning import independent_episodes_needed, starts_needed
from vlafit.significance.sequential import anytime_p, first_rejection

__all__ = [
    "Pairs",
    "anytime_p",
    "best_set",
    "first_rejection",
    "holm",
    "independent_episodes_needed",
    "paired_interval",
    "paired_t_p",
    "sign_flip_p",
    "starts_needed",
    "two_way_interval",
]
