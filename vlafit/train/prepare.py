"""Prepare a run before anything is written: settle its memory, build it, compare it with what it needs."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from vlafit import files, rollout
from vlafit.agreement import EVALUATION, protocol_items, replan_items
from vlafit.entry_points import outside_hashes
from vlafit.errors import CodecError, WeightsError
from vlafit.execution import Execution
from vlafit.recipe import Recipe
from vlafit.train import checkpointer, data_files, extension, processes
from vlafit.train.data import Data, open_data
from vlafit.train.experiment import Experiment, build
from vlafit.train.fit import close, device_gb, fit, free_ram_gb, is_large
from vlafit.train.memory_ladder import IGNORE
from vlafit.train.preflight import meta_policy, resumed_policy, run_warnings
from vlafit.train.run_folder import flat
from vlafit.train.settle import Settled


def identity(
    experiment: Experiment, data_facts: Mapping[str, Mapping[str, int]], resumed: Path | None
) -> dict[str, object]:
    """Return what must be equal on all processes, or they would train apart.

    `resumed` is the checkpoint that goes on: machines may each have a run's folder of their own.
    `data_facts` are those of the data's files; copies of them on two machines have different times.
    """
    return {
        **dict(flat(experiment.recipe)),
        "data": experiment.data.fingerprint,
        "frames": {name: (facts["files"], facts["bytes"]) for name, facts in data_facts.items()},
        "cards": data_files.readings(experiment.data),
        "agreement": experiment.agreement and experiment.agreement.to_json(),
        "code": processes.code_hash(),
        "modules": outside_hashes(),
        "torch": torch.__version__,
        "plan": experiment.plan.to_json(),
        "load report": experiment.load_report,
        "checkpoint that goes on": resumed and files.sha256(resumed / checkpointer.FACTS),
    }


def build_with_warnings(
    recipe: Recipe, accelerator: Accelerator, resumed: Path | None, data: Data | None
) -> Experiment:
    """Build the experiment with its warnings. Errors about damaged checkpoints say how to recover."""
    try:
        experiment = build(recipe, accelerator.device, resumed, data)
    except (WeightsError, CodecError) as error:
        if resumed is None:
            raise
        remedy = checkpointer.how_to_resume(resumed)
        raise type(error)(f"{error}\nIf {resumed} is damaged: {remedy}") from error
    warnings = run_warnings(recipe, experiment.plan, experiment.data, accelerator.num_processes)
    return replace(experiment, warnings=(*experiment.warnings, *warnings))


def settle_memory(
    recipe: Recipe, accelerator: Accelerator, resumed: Path | None
) -> tuple[Recipe, Data | None]:
    """Settle what `train.memory` decides, and refuse a run that does not fit, before anything is loaded.

    Returns the data, too, where the forecast needed it.
    """
    gigabytes = device_gb(accelerator.device)
    if recipe.train.memory == IGNORE:
        return close(recipe), None
    if gigabytes is None and (recipe.train.batch_size == "auto" or is_large(recipe)):
        gigabytes = free_ram_gb(accelerator.device)
    if gigabytes is None and not recipe.train.memory:
        return close(recipe), None
    data = open_data(recipe.data, recipe.train.seed)
    policy = meta_policy(recipe, data) if resumed is None else resumed_policy(recipe, resumed)
    fitting = fit(
        recipe,
        policy,
        data,
        processes=accelerator.num_processes,
        gigabytes=gigabytes,
        on_cpu=accelerator.device.type == "cpu",
    )
    return fitting.recipe, data


def with_settings(experiment: Experiment, settled: Settled) -> Experiment:
    """Add what recipe and launcher said to the agreement, and what has no effect to the warnings."""
    agreement = experiment.agreement
    if agreement is not None:
        known = {item.name for item in agreement.items}  # a resumed run's has them already
        items = [setting.item() for setting in settled.settings if setting.field not in known]
        agreement = agreement.with_items(items)
    return replace(experiment, agreement=agreement, warnings=(*experiment.warnings, *settled.notes))


def with_protocol(experiment: Experiment) -> Experiment:
    """Check before training that the evaluation protocol fits this policy, and add it to the agreement."""
    spec, agreement = experiment.recipe.eval, experiment.agreement
    if not spec.protocol:
        return experiment
    trained = experiment.codecs.choose(experiment.evaluated, where="the run", option="eval.embodiment")
    robot = rollout.preflight(
        spec.protocol,
        trained.embodiment,
        trials=spec.every_trials if spec.every else 0,
        wrong_instruction=spec.wrong_instruction,
        seeds=experiment.history.seeds,
    )
    if agreement is None or any(item.name.startswith(EVALUATION) for item in agreement.items):
        return experiment
    items = protocol_items(trained.embodiment, robot, spec.protocol)
    execution = Execution(replan=rollout.load_protocol(spec.protocol).replan)
    items += replan_items(execution, trained.config.chunk, EVALUATION)
    return replace(experiment, agreement=agreement.with_items(items))


def with_extension(experiment: Experiment, saved: Recipe | None) -> Experiment:
    """Add a warning if the run of the recipe `saved` has fewer steps."""
    text = extension.notice(saved, experiment.recipe) if saved is not None else ""
    return replace(experiment, warnings=(*experiment.warnings, text)) if text else experiment
