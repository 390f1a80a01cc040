"""Warn about the episodes of a run: none, or whole instructions, held out; copies."""

from collections.abc import Iterator

from vlafit.datasets.leaks import Repeat, repeats
from vlafit.datasets.split import groups_of
from vlafit.errors import quoted
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


def line_break_warnings(data: Data) -> tuple[str, ...]:
    """Return a sentence for each dataset with an instruction that holds a line break."""
    sentences = []
    for store in data.stores:
        broken = [info for info in store.episodes if len(info.instruction.strip().splitlines()) > 1]
        if broken:
            sentences.append(
                f"dataset {store.card.name!r}: the instruction of {len(broken)} episodes holds a line break "
                f"({quoted(broken[0].instruction, 80)} of {broken[0].id!r}). Prompts end in one, or take "
                "it for a blank: say the same at run time, or write the instruction in one line"
            )
    return tuple(sentences)


def repeat_warnings(data: Data) -> tuple[str, ...]:
    """Return a sentence where episodes of a robot are trained on more than once."""
    sentences = []
    for part in data.parts().values():
        chosen = zip(part.cards, part.stores, part.training, strict=True)
        found: dict[tuple[str, str, bool], list[Repeat]] = {}
        for repeat in repeats((f"card {card.name!r}", store, ids) for card, store, ids in chosen):
            found.setdefault((repeat.where, repeat.first_where, repeat.whole), []).append(repeat)
        for (where, first_where, whole), those in found.items():
            others = "others" if where == first_where else f"episodes of {first_where}"
            change = "" if whole else " with another instruction, or other states or actions"
            sentences.append(
                f"{where}: {len(those)} training episodes are copies of {others}{change} "
                f"({those[0].episode!r} of {those[0].first!r}, say): they count once more. If that is not "
                "meant, leave them out (episodes.skip in the card)"
            )
    return tuple(sentences)
