"""Fine-tuning: from a recipe to a run folder with checkpoints, metrics, rollouts and a report.

`run` is the whole job, `loop` the page that trains, `setup` what a recipe asks for, `state` what resumes.
"""

from vlafit.train.run import RunSummary, run

__all__ = ["RunSummary", "run"]
