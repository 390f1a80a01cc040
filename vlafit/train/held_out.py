"""Compare a finished run's actions with those of its held-out episodes, where no simulator shows success."""

import logging
import re
import shutil
from pathlib import Path

from vlafit import offline
from vlafit.actor import load_actor
from vlafit.errors import VlafitError, command_line
from vlafit.offline.contract import agree
from vlafit.offline.folder import HEADER, read_object
from vlafit.report.facts import OFFLINE
from vlafit.train.context import RunContext
from vlafit.train.trackers import log_held_out

log = logging.getLogger(__name__)

DRAWS = 4  # of noise: enough to see a spread, and cheap


def wanted(context: RunContext) -> bool:
    """Whether the recipe asks for this evaluation, and there are episodes for it."""
    recipe = context.recipe.eval
    held_out = any(context.experiment.data.validation)
    return bool(recipe.after and recipe.samples and not recipe.protocol and held_out)


def evaluate(context: RunContext, step: int) -> dict[str, str]:
    """Evaluate the checkpoint of `step` on each dataset's held-out episodes; return a sentence for each.

    The run has finished, so an error that a user can fix is a warning.
    """
    from vlafit.report.offline import verdict  # matplotlib, which other runs do not import

    data, sentences = context.experiment.data, {}
    context.callbacks.phase("held-out episodes")
    for store, training, validation in zip(data.stores, data.training, data.validation, strict=True):
        if not validation:
            continue
        name = store.card.name
        out = context.out / OFFLINE / re.sub(r"[^\w.-]", "_", name)
        try:
            several = len(context.experiment.codecs) > 1
            actor = load_actor(
                context.manager.path(step),
                width=offline.WIDTH,
                device=str(context.device),
                trust=context.recipe.policy.trust,
                embodiment=data.name_of(store) if several else "",
            )
            identity = actor.fingerprint()
            _forget_other(out, identity)
            result = offline.evaluate(
                actor,
                store,
                offline.Episodes(validation, training, "Held out from training (data.validation)."),
                out,
                offline.Settings(samples=context.recipe.eval.samples, draws=DRAWS),
                identity=identity,
                history=context.experiment.codecs.history,
                resume=True,
                agreement=agree(actor, store),
            )
            sentences[name] = verdict(result)
            log_held_out(context.accelerator, name, step, result)
        except VlafitError as error:
            again = command_line("eval", context.out, "--data", store.card.file or store.card.path)
            log.warning("held-out episodes of %s were not evaluated: %s. Later: %s", name, error, again)
    return sentences


def _forget_other(out: Path, identity: str) -> None:
    """Remove the evaluation of an earlier checkpoint of this run."""
    header = out / HEADER
    if header.is_file() and read_object(header).get("actor") != identity:
        shutil.rmtree(out)
