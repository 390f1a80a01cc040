"""Count the demonstrations that are recorded as failed where the card does not leave them out."""

from dataclasses import replace

from vlafit.datasets.card import ExpectCard
from vlafit.datasets.checks.catalogue import Untested
from vlafit.datasets.checks.finding import Finding
from vlafit.datasets.load import open_dataset
from vlafit.datasets.selection import NothingLeftError
from vlafit.datasets.store import EpisodeStore
from vlafit.errors import DataError

NAMED = 3  # episodes


def check_success(store: EpisodeStore, untested: Untested) -> list[Finding]:
    """Return a finding if files record success, some episodes have none, and the card follows no success."""
    card = store.card
    if card.episodes.success:
        return []
    if card.source:
        untested.add("failed_episodes", "the dataset is remote; a card with episodes.success is followed")
        return []
    key = store.success_key()
    if not key:
        untested.add("failed_episodes", "no success was found in the files")
        return []
    filtered = replace(card, episodes=replace(card.episodes, success=key), expect=ExpectCard())
    try:
        left_out = open_dataset(filtered).left_out
    except NothingLeftError as error:
        left_out = error.left_out
    except DataError as error:
        untested.add("failed_episodes", str(error))
        return []
    used = {info.id for info in store.episodes}
    failed = [one.id for one in left_out if one.id in used]
    return [_finding(key, failed, len(used))] if failed else []


def _finding(key: str, failed: list[str], total: int) -> Finding:
    more = f" and {len(failed) - NAMED} more" if len(failed) > NAMED else ""
    return Finding(
        "warning",
        "failed_episodes",
        "",
        None,
        f"{len(failed)} of {total} episodes are recorded as failed ({key!r} is true at no step): "
        f"{', '.join(failed[:NAMED])}{more}",
        "all are used: the policy learns from failures as it does from successes",
        f'write in a card, below [episodes]: success = "{key}"; or keep them knowingly (play, recoveries)',
    )
