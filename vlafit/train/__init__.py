"""Fine-tuning: from a recipe to a run folder with checkpoints, metrics, rollouts and a report.

`run` is the whole job and `loop` the page that trains. Around them: `checks` and `setup` (what a recipe asks
for), `feed` and `draws` (which samples, with which noise), `job` (what happens between steps), `state` and
`shelf` (what resumes, and where it lies), `folder` (whose run it is), `parallel` (several processes).
"""

from vlafit.train.run import RunSummary, run

__all__ = ["RunSummary", "run"]
