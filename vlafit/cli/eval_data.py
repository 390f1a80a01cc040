"""`vlafit eval CHECKPOINT --data CARD`: show an evaluation on recorded episodes on the console."""

import re
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlafit.agreement import Agreement
from vlafit.cli.actor import recipe_of
from vlafit.cli.console import Line, differences_table, table
from vlafit.cli.places import default_out, deleted_by_run, gone

if TYPE_CHECKING:
    from vlafit.types import Actor


def evaluate_on_data(options: Namespace, name: Path, load: Callable[[], "Actor"]) -> int:
    """Evaluate on the episodes of `options.data`, print the table, and write the page."""
    from vlafit.actor import PolicyActor
    from vlafit.datasets import checksums, open_dataset
    from vlafit.offline import Settings, choose_episodes, evaluate
    from vlafit.offline.contract import (
        UNADAPTED,
        Confirmed,
        adaptations,
        agree,
        compare_readings,
        compare_values,
        require_robot,
    )
    from vlafit.report import offline as report

    settings = Settings(
        samples=64 if options.samples is None else options.samples,
        draws=8 if options.draws is None else options.draws,
    )
    store = open_dataset(options.data)
    checksums.require_same([store])
    checkpoint = name if options.actor is None else None
    episodes = choose_episodes(store, checkpoint, options.episodes or ())
    out = (
        Path(options.out)
        if options.out
        else default_out(name, Path("data-" + re.sub(r"[^\w.-]", "_", store.card.name)), False)
    )
    actor = load()
    identity = require_robot(actor, store)
    items = agree(actor, store)
    is_local = isinstance(actor, PolicyActor)
    adapt = UNADAPTED
    if is_local and options.recipe is not None:
        adapt = recipe_of(options).adapt.of(actor.embodiment.name)
    elif is_local:
        adapt = adaptations(name, actor.embodiment.name)
    confirmed = Confirmed(
        tuple(options.confirm_cameras or ()),
        options.confirm_frames,
        options.confirm_conversion,
        options.confirm_relative,
    )
    items += compare_readings(actor, store, str(name), adapt, confirmed)
    if is_local:
        items += compare_values(actor.codec, store, str(name), (*adapt.outside, *(options.outside or ())))
    if checkpoint is not None and deleted_by_run(checkpoint):
        raise gone(checkpoint)  # what it says of its data was incomplete
    with Line("observations", 1) as line:

        def progress(done: int, total: int, episode: str) -> None:
            line.total = total
            line.update(done, episode)

        result = evaluate(
            actor,
            store,
            episodes,
            out,
            settings,
            identity=identity,
            history=actor.codec.config.history if isinstance(actor, PolicyActor) else 1,
            resume=options.resume,
            progress=progress,
            agreement=items,
        )
    if items:
        print(differences_table(Agreement(tuple(items), (), ())))
    page = report.build(out)
    count = len(result["episodes"])
    print(f"{count} episode{'s' * (count != 1)} of {store.card.name}: {result['chosen']}")
    print(f"measured over {result['measured_over']}")
    print(_table(result))
    if result["not_read"]:
        print(f"the policy does not read: {', '.join(result['not_read'])}")
    print(report.verdict(result))
    for notice in result["notices"]:
        print(notice)
    print(f"report: {page}")
    return 0


def _table(result: Mapping[str, Any]) -> str:
    """Return the errors of policy and baselines, and how much each input matters."""
    rows = []
    for who in ("policy", "mean_of_draws", "hold_still", "mean_chunk"):
        mean = result["overall"][who]
        if mean is not None:
            rows.append((who.replace("_", " "), f"{mean['value']:.4f}", _interval(mean)))
    rows += [
        (f"change without {one['input']}", f"{one['change']['value']:.4f}", _interval(one["change"]))
        for one in result["sensitivity"]
    ]
    return table(("in standard deviations of each joint", "mean", "95 % interval"), rows)


def _interval(mean: Mapping[str, float | None]) -> str:
    return "-" if mean["low"] is None else f"{mean['low']:.4f} to {mean['high']:.4f}"
