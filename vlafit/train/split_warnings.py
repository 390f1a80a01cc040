"""Say where the split of a run's episodes holds nothing out, or whole instructions."""

from collections.abc import Iterator

from vlafit.datasets.split import groups_of
from vlafit.observations import short
from vlafit.recipe import DataRecipe
from vlafit.train.data import Data


def split_warnings(recipe: DataRecipe, data: Data) -> tuple[str, ...]:
    """Return sentences where nothing is held out, or instructions are that no training episode has."""
    if not recipe.validation:
        return ()
    if any(data.validation):
        return tuple(_only_held_out(data))
    groups = [group for store in data.stores for group in groups_of(store)]
    count, most = sum(len(g.ids) for g in groups), max((len(g.ids) for g in groups if g.alone), default=0)
    each = "its only task has one episode"
    if count > 1:
        each = f"each of the {count} tasks has one episode, with an instruction of its own"
    instead = "only the validation sets tell whether it learns"
    if not recipe.validation_sets:
        more = f"Set data.validation = {1 / most:.2g} to hold out one of {most}, r" if most else "R"
        instead = (
            "no loss tells whether it learns, and none which checkpoint is the best. "
            f"{more}ecord more episodes of a task, or name another dataset in data.validation_sets"
        )
    return (f"data.validation = {recipe.validation:g} holds no episode out, because {each}: {instead}.",)


def _only_held_out(data: Data) -> Iterator[str]:
    """Yield a sentence for each dataset of whose tasks with one episode some are held out."""
    for store, held_out in zip(data.stores, data.validation, strict=True):
        for group in groups_of(store):
            out = [i for i in group.ids if i in {*held_out}] if group.alone else []
            if out:
                sentence = store.episodes[store.index(out[0])].instruction
                yield (
                    f"dataset {store.card.name!r}: {len(group.ids)} of its episodes are the only ones of "
                    f"their task; {len(out)} of these are held out, so nothing trains on their instructions "
                    f"({short(sentence)}, say). Give episodes of one task the same instruction"
                )
