"""Train a policy from a recipe into a run folder with checkpoints, metrics, rollouts and a report.

`run` runs a recipe, `trainer` trains and does what is due between steps, `loop` is the training loop.
`preflight` checks a recipe, `data`, `initial_policy` and `experiment` build what it asks for, `dataloader`
and `noise` decide samples and noise, `train_state` holds policy, optimiser and EMA, `checkpointer` saves and
resumes, `evaluator` rolls out, `run_folder` guards the folder, `distributed` hides the processes, `callbacks`
report progress.
"""

from vlafit.train.callbacks import Callbacks
from vlafit.train.run import RunSummary, run
from vlafit.train.trainer import RunStatus

__all__ = ["Callbacks", "RunStatus", "RunSummary", "run"]
