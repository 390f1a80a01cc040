"""Make the sentences of a model card's results from the evaluations in a run's folder."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlafit.checkpoints.locate import digest
from vlafit.errors import VlafitError, brief
from vlafit.offline import read_checked
from vlafit.report.evaluations import Evaluation, read_evaluation
from vlafit.score import InvalidAnswers

log = logging.getLogger(__name__)


def results_of(folder: Path) -> tuple[str, ...]:
    """Return a sentence for each evaluation in the run's folder of this very checkpoint.

    One whose numbers are not those of its episodes is left out, with a warning.
    """
    folder = Path(folder)
    run = folder.parent.parent
    if not (run / "recipe.toml").is_file() or not (folder / "manifest.json").is_file():
        return ()
    own = digest(folder)
    return tuple(
        line
        for path in sorted([*run.glob("eval/*/result.json"), *run.glob("held_out/*/result.json")])
        for line in _sentences(path.parent, own)
    )


def _sentences(path: Path, own: str) -> Iterator[str]:
    """Yield the sentence of one evaluation, if it is of the checkpoint with this digest."""
    try:
        if path.parent.name == "held_out":
            value = read_checked(path)
            if own in str(value["actor"]):
                yield _offline(value)
            return
        evaluation = read_evaluation(path.name, path)
        if own in evaluation.actor:
            yield _played(evaluation)
    except (VlafitError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s: left out of the model card: %s", path, brief(error))


def _played(evaluation: Evaluation) -> str:
    total = evaluation.overall
    assert total.rate is not None  # an evaluation without a valid episode ends in an error
    low, high = total.interval
    probe = ", wrong instruction (lower is better)" if evaluation.wrong_instruction else ""
    return (
        f"protocol {evaluation.protocol['name']}{probe}: {total.successes} of {total.episodes} "
        f"succeed, {100 * total.rate:.0f} % (95 %: {100 * low:.0f} to {100 * high:.0f} %)"
        + (f"; {evaluation.invalid_answers}" if evaluation.invalid_answers is not None else "")
    )


def _offline(value: Mapping[str, Any]) -> str:
    means = {who: value["overall"][who] for who in ("policy", "hold_still", "mean_chunk")}
    numbers = [f"{who.replace('_', ' ')} {_mean(mean)}" for who, mean in means.items() if mean]
    settings = value["settings"]
    over = value.get("measured_over") or f"{value['observations']} observations"
    return (
        f"{value['dataset']}, mean absolute error of chunks in standard deviations of each joint: "
        f"{'; '.join(numbers)}. {_invalid(InvalidAnswers.of(value))}"
        f"Measured over {over}. {value['chosen']} Measure it again with "
        f"`--samples {settings['samples']} --draws {settings['draws']}`: other observations or draws "
        "give other numbers."
    )


def _invalid(invalid: InvalidAnswers | None) -> str:
    """Return a sentence on the answers that were no chunk of actions."""
    if invalid is None:
        return ""
    executed = "; the error is then that of what is executed in their place" if invalid.invalid else ""
    return f"{invalid}{executed}. "


def _mean(mean: Mapping[str, float | None]) -> str:
    if mean["low"] is None:
        return f"{mean['value']:.3f} (one episode: no interval)"
    return f"{mean['value']:.3f} (95 %: {mean['low']:.3f} to {mean['high']:.3f})"
