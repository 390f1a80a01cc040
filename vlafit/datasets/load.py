"""Read data cards and open the datasets they describe."""

import dataclasses
import errno
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from vlafit import arguments, config, shipped
from vlafit.datasets import downloads, hub, layouts, remote
from vlafit.datasets.aligned import Aligned
from vlafit.datasets.card import Card, Draft, EpisodesCard
from vlafit.datasets.card_check import check
from vlafit.datasets.naming import name_of
from vlafit.datasets.store import EpisodeStore
from vlafit.errors import ConfigError, DataError, command_line, did_you_mean, quoted
from vlafit.files import expand_user

log = logging.getLogger(__name__)

LONGEST_PATH = 4096  # characters, with which POSIX systems end


def load_card(name_or_path: str | Path) -> Card:
    """Read a card: a path, the name of one that ships, or a dataset that needs none.

    A folder, a file or a URL of data (or ``org/name[@revision]`` of the Hugging Face Hub) needs no card if
    its layout can describe it, as LeRobot's can. Raises ConfigError saying what is invalid in the card.
    """
    _require_name(name_or_path)
    try:
        data, url = _data_at(name_or_path)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise DataError(f"{quoted(str(name_or_path))}: is too long for the name of a file") from None
    if data is not None:
        draft = describe(data)
        if data != expand_user(name_or_path):  # a copy
            draft = replace(draft, card=replace(draft.card, name=name_of(str(name_or_path))))
        if remote.is_url(str(name_or_path)):
            card = replace(draft.card, source=url or str(name_or_path), path=url or draft.card.path)
            draft = replace(draft, card=card)
        if draft.missing:
            listed = "".join(f"\n  {key}: {reason}" for key, reason in draft.missing.items())
            raise DataError(
                f"{data}: layout {draft.card.layout!r} needs a card, because the files do not tell:{listed}\n"
                f"Run: {command_line('data', 'card', data)} > my.toml, fill these in, and name my.toml"
            )
        return prepare(draft.card)
    path = shipped.find("card", str(name_or_path))
    values = config.load_toml(path, "card")
    if "file" in values:
        raise ConfigError(f"{path}: `file` is filled in when the card is read; leave it out")
    card = replace(build(values, str(path)), file=path)
    return prepare(card)


def open_dataset(card_path_or_hub_id: Card | str | Path) -> EpisodeStore:
    """Open a dataset: a card, the name or path of one, or what `load_card` takes in place of one.

    Raises DataError saying where the files are not what the card says.
    """
    source = card_path_or_hub_id
    card = prepare(source) if isinstance(source, Card) else load_card(arguments.path("card", source))
    store = _open(card)
    if card.episodes != EpisodesCard() and not store.selects:
        raise ConfigError(
            f"{card.file or card.name}: layout {card.layout!r} knows no [episodes] (skip, success, on_bad); "
            "leave the table out"
        )
    if card.rows.observations and not store.counts_rows:
        raise ConfigError(
            f"{card.file or card.name}: layout {card.layout!r} knows no rows.observations; leave it out"
        )
    if card.rows.action_shift:
        store = Aligned(store, card.rows.action_shift)
    _check_expectations(store)
    _name_unused_sentences(store)
    return store


def _open(card: Card) -> EpisodeStore:
    """Open the files of a card: here, at a URL in place, or as a copy of what is at a URL."""
    module = layouts.load(card.layout)
    if not remote.is_url(card.path):
        return module.open(card)
    if "open_in_place" in vars(module):
        files = remote.in_place(card.path)
        if files is not None:
            local = replace(card, path=str(files.root), source=card.source or card.path)
            return module.open_in_place(local, files)
    fixed, pattern = remote.split_pattern(card.path)
    local = remote.fetch(fixed) / pattern
    return module.open(replace(card, path=str(local), source=card.source or card.path))


def open_draft(draft: Draft) -> EpisodeStore:
    """Open the dataset of a drafted card to look at it, with placeholders for what is missing in it."""
    card, missing = draft.card, draft.missing
    robot = card.robot
    unknown = [key for key in missing if key.endswith((".keys", ".dimensions"))]
    if unknown:
        raise DataError(
            f"{card.path}: its episodes cannot be shown before a card names their columns:\n  "
            + "\n  ".join(f"{key}: {missing[key]}" for key in unknown)
            + f"\nRun: {command_line('data', 'card', card.path)} > my.toml, and fill it in"
        )
    cameras = tuple(
        replace(camera, channels="rgb") if f"robot.cameras.{n}.channels" in missing else camera
        for n, camera in enumerate(robot.cameras)
    )
    state, action = (
        replace(column, scale=(1.0,) * column.dimensions) if f"robot.{name}.scale" in missing else column
        for name, column in (("state", robot.state), ("action", robot.action))
    )
    instruction, episodes = card.instruction, card.episodes
    if "instruction.text" in missing:
        instruction = replace(instruction, text="(no sentence in the files)")
    if "episodes.on_bad" in missing:
        episodes = replace(episodes, on_bad="skip")
    robot = replace(robot, hz=robot.hz or 1.0, cameras=cameras, state=state, action=action)
    return open_dataset(replace(card, robot=robot, instruction=instruction, episodes=episodes))


def describe(path: Path, layout: str = "") -> Draft:
    """Draft a card from the files at `path`, of the layout named, or recognised if none is.

    A layout is given the absolute path: a relative one in a card is looked for elsewhere. Raises DataError if
    their layout is unknown or cannot do it.
    """
    path = expand_user(path).resolve()
    name = layout or layouts.recognise(path)
    module = layouts.load(name)
    if "describe" not in vars(module):
        raise DataError(f"{path}: layout {name!r} cannot describe its files; write a card")
    if layout and not module.recognise(path):
        raise DataError(f"{path}: is not of layout {layout!r}")
    return module.describe(path)


def describe_remote(url_or_id: str, layout: str = "") -> Draft:
    """Draft the card of a dataset at a URL, or of an id of the Hub, copying no more than that takes.

    The card's path is the URL, of the commit that was looked at if it is on the Hub.
    """
    url = url_or_id if remote.is_url(url_or_id) else hub.url_of(url_or_id)
    files = remote.in_place(url) if remote.is_url(url_or_id) else None
    local = files.root if files else remote.fetch(url, downloads.METADATA)
    draft = describe(local, layout)
    pinned = files.url if files else hub.at_commit(url.rstrip("/"), local)
    path = draft.card.path.replace(str(local.resolve()), pinned)
    return replace(draft, card=replace(draft.card, name=name_of(url_or_id), path=path))


def is_remote(text: str) -> bool:
    """Whether `text` is the URL of a dataset, or an id of the Hub that is neither a path nor a card here."""
    if remote.is_url(text):
        return not text.endswith(".toml")
    if expand_user(text).exists() or not hub.is_id(text):
        return False
    try:
        shipped.find("card", text)
    except ConfigError:
        return True
    return False


def build(values: Mapping[str, Any], where: str) -> Card:
    """Make a card of TOML values. Keys of the layout's section may stand in its table or at the top."""
    values = dict(values)
    if "section" in values:
        raise ConfigError(f"{where}: unknown key 'section'; the layout's options are in a table of its name")
    layout = values.get("layout")
    if not isinstance(layout, str):
        return config.build(Card, values, where)  # raises, naming the key
    try:
        module = layouts.load(layout)
    except ConfigError as error:
        raise ConfigError(f"{where}: layout: {error}") from error
    table = layouts.section_name(layout)
    given = values.pop(table, {})
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}: {table}: expected a table of the layout's options, got {given!r}")
    options = dict(given)
    core = {field.name for field in dataclasses.fields(Card)}
    own = {field.name for field in dataclasses.fields(module.Section)}
    for key in [key for key in values if key not in core]:
        if key not in own:
            raise ConfigError(f"{where}: unknown key {key!r}{_whose(key, core | own | {table}, layout)}")
        if key in options:
            raise ConfigError(f"{where}: {key!r} stands at the top and in [{table}]; keep the second")
        options[key] = values.pop(key)  # the spelling of older cards
    section = config.build(module.Section, options, f"{where}: [{table}]")
    return replace(config.build(Card, values, where), section=section)


def _whose(key: str, known: set[str], layout: str) -> str:
    near = did_you_mean(key, known, listed=False)
    if near:
        return near
    others = [
        name
        for name in layouts.names()
        if key == name or key in {field.name for field in dataclasses.fields(layouts.load(name).Section)}
    ]
    if others:
        return f": layout {layout!r} has none; it belongs to layout {' or '.join(others)}"
    return did_you_mean(key, known)


def prepare(card: Card) -> Card:
    """Check a card against its layout, and fill in the layout's defaults. Raises ConfigError."""
    where = str(card.file or f"card {card.name!r}")
    check(card, where)
    module = layouts.load(card.layout)
    sources: tuple[str, ...] = module.INSTRUCTIONS
    source = card.instruction.source
    if not source and not (sources and sources[0]):
        raise ConfigError(
            f'{where}: files of layout {card.layout!r} hold no instruction; set instruction.source = "card"'
        )
    if source not in ("", "card", *sources):
        known = ["card", *filter(None, sources)]
        raise ConfigError(
            f"{where}: instruction.source: {source!r} is none of {', '.join(map(repr, known))}, which layout "
            f"{card.layout!r} has{did_you_mean(source, known, listed=False)}"
        )
    _check_section(module, card, where)
    instruction = card.instruction if source else replace(card.instruction, source=sources[0])
    return replace(card, section=card.options(module.Section), instruction=instruction)


def _check_section(module: ModuleType, card: Card, where: str) -> None:
    if card.section is not None and not isinstance(card.section, module.Section):
        raise ConfigError(f"{where}: its options are not those of layout {card.layout!r}")


def _require_name(name_or_path: object) -> None:
    """Raise ConfigError for what cannot be the name or path of a card or a dataset."""
    if not isinstance(name_or_path, str | Path):
        raise ConfigError(
            "a dataset is named by a path, a URL, an id of the Hub or the name of a card (str or "
            f"pathlib.Path), not by a {type(name_or_path).__name__}"
        )
    if len(str(name_or_path)) > LONGEST_PATH:
        raise ConfigError(f"{str(name_or_path)[:40]}...: a path has at most {LONGEST_PATH} characters")


def _data_at(name_or_path: str | Path) -> tuple[Path | None, str]:
    """Return the data that stands in for a card, and its URL if it is read in place.

    That is a folder or file that is no TOML, the copy of a hub id, or what is here of a URL's files.
    """
    if isinstance(name_or_path, str) and is_remote(name_or_path):
        if not remote.is_url(name_or_path):
            return hub.fetch_id(name_or_path), ""
        files = remote.look_at(name_or_path)
        return (files.root, files.url) if files else (remote.fetch(name_or_path), "")
    local = expand_user(name_or_path)
    if str(name_or_path) and local.exists() and (local.is_dir() or local.suffix != ".toml"):
        return local, ""
    return None, ""


def _name_unused_sentences(store: EpisodeStore) -> None:
    """Warn of sentences of the card that no episode has: the name that they are under may be misspelt."""
    used = {info.instruction for info in store.episodes}
    unused = [name for name, sentence in store.card.instruction.files.items() if sentence not in used]
    if unused:
        log.warning(
            "dataset %r: instruction.files names what no episode is of: %s%s",
            store.card.name,
            ", ".join(map(repr, unused[:5])),
            f" and {len(unused) - 5} more" if len(unused) > 5 else "",
        )


def _check_expectations(store: EpisodeStore) -> None:
    card, episodes = store.card, store.episodes
    twice = sorted(i for i, times in Counter(info.id for info in episodes).items() if times > 1)[:5]
    if twice:
        raise DataError(f"dataset {card.name!r}: episode ids are not unique: {', '.join(twice)}")
    expected = card.expected_episodes
    if expected and len(episodes) + len(store.left_out) != expected:
        fix = "complete the files, or fix the card"
        if card.record is not None:
            again = command_line("record", card.file or card.name)
            fix = f"finish recording with: {again}; or set expect.episodes"
        raise DataError(
            f"dataset {card.name!r} has {len(episodes) + len(store.left_out)} episodes in "
            f"{len(store.files())} files, its card "
            f"expects {expected}; {fix}"
        )
    frames = sum(info.length for info in episodes)
    if card.expect.frames and not store.left_out and frames != card.expect.frames:
        raise DataError(f"dataset {card.name!r} has {frames} frames, its card expects {card.expect.frames}")
