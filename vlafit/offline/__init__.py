"""Evaluate a policy without a simulator: its chunks against recorded ones on episodes it has not learned.

It shows whether a policy learned anything (baselines), whether it looks at what it is given (blanked inputs),
and whether its spread is honest (calibration). It does not show success: small errors add up on a robot.
"""

from vlafit.offline.checked import read_checked
from vlafit.offline.episodes import Episodes, choose_episodes
from vlafit.offline.evaluate import WIDTH, Settings, evaluate
from vlafit.offline.folder import RESULT, read_result

__all__ = [
    "RESULT",
    "WIDTH",
    "Episodes",
    "Settings",
    "choose_episodes",
    "evaluate",
    "read_checked",
    "read_result",
]
