"""Check what files and card of a dataset declare: names, keys of cameras, splits, files of no episode."""

from collections import Counter
from collections.abc import Iterator

from vlafit.agreement.columns import plain_label
from vlafit.datasets.checks.finding import Finding
from vlafit.datasets.store import EpisodeStore

NAMED = 3  # files


def check_declared(store: EpisodeStore) -> list[Finding]:
    """Return what is declared and leads to another result than a reader may expect. Reads no episode."""
    return [*_repeated_names(store), *_shared_keys(store), *_splits(store), *_unnamed_files(store)]


def _repeated_names(store: EpisodeStore) -> Iterator[Finding]:
    robot = store.card.robot
    for column, labels in (("state", robot.state.labels), ("action", robot.action.labels)):
        plain = list(map(plain_label, labels))
        for name, times in Counter(plain).items():
            if times == 1:
                continue
            numbers = [str(number) for number, label in enumerate(plain) if label == name]
            yield Finding(
                "warning",
                "repeated_names",
                "",
                None,
                f"{column}: dimensions {', '.join(numbers[:-1])} and {numbers[-1]} are both {name!r}",
                "names (of relative actions, adapt.outside, a joint's figures) do not tell them apart",
                f"give each a name in a card: robot.{column}.labels",
            )


def _shared_keys(store: EpisodeStore) -> Iterator[Finding]:
    cameras = store.card.robot.cameras
    for key, times in Counter(camera.key for camera in cameras).items():
        if times == 1:
            continue
        names = [camera.name for camera in cameras if camera.key == key]
        yield Finding(
            "warning",
            "shared_keys",
            "",
            None,
            f"cameras {', '.join(names[:-1])} and {names[-1]} are read from the same key, {key}",
            "the policy sees one picture in the place of several",
            "correct the keys in the card, or leave out all but one of these cameras",
            tuple(names),
        )


def _splits(store: EpisodeStore) -> Iterator[Finding]:
    splits = store.splits
    if not splits or list(splits.values()) == [f"0:{len(store.episodes) + len(store.left_out)}"]:
        return
    listed = ", ".join(f"{name} {value}" for name, value in splits.items())
    yield Finding(
        "warning",
        "splits",
        "",
        None,
        f"its files split the episodes: {listed}",
        "the split is not followed: all episodes of the card are used, and data.validation holds some out",
        "write the episodes to train on in a card ([lerobot] episodes), and those to validate on in another "
        "(data.validation_sets)",
    )


def _unnamed_files(store: EpisodeStore) -> Iterator[Finding]:
    names = store.unnamed_files()
    if names:
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        listed = f"{', '.join(names[:NAMED])}{more}"
        yield Finding(
            "warning",
            "unnamed_files",
            "",
            None,
            f"{len(names)} file{'s' * (len(names) > 1)} of no episode in meta/: {listed}",
            "what is in them is not used; perhaps a recording stopped before it wrote meta/",
            "record or convert these episodes again, or delete the files",
        )
