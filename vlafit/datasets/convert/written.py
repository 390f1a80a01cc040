"""The result of writing a dataset in another layout, and the card that goes with it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from vlafit.datasets.card import (
    CameraCard,
    Card,
    ColumnCard,
    EpisodesCard,
    ExpectCard,
    InstructionCard,
    RecordSpec,
    RowsCard,
)
from vlafit.datasets.store import EpisodeStore


@dataclass(frozen=True)
class Written:
    """A dataset that was written."""

    card: Card
    order: tuple[int, ...]
    """For each new episode, the position of the one that it was made of."""
    lost: tuple[str, ...]
    """What the layout does not keep, a sentence each."""


def card_for(
    store: EpisodeStore,
    layout: str,
    cameras: Mapping[str, str],
    state: str,
    action: str,
    source: str,
    record: RecordSpec | None = None,
) -> Card:
    """Return the card of a copy of `store` in another layout, with its keys, beside the files.

    What said how to read the old files (scales, turns, rows, skipped episodes) is not in it.
    """
    card, robot = store.card, store.card.robot
    return replace(
        card,
        layout=layout,
        path=".",
        file=None,
        section=None,
        instruction=InstructionCard(source),
        rows=RowsCard(),
        episodes=EpisodesCard(),
        expect=ExpectCard(len(store.episodes), sum(info.length for info in store.episodes)),
        record=record,
        robot=replace(
            robot,
            cameras=tuple(CameraCard(c.name, cameras[c.name], c.height, c.width) for c in robot.cameras),
            state=_as_read(robot.state, state),
            action=_as_read(robot.action, action),
        ),
    )


def _as_read(column: ColumnCard, key: str) -> ColumnCard:
    return replace(column, keys=(key,), scale=(), offset=())
