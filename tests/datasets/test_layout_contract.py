"""What every layout must do; a module in vlafit/datasets/layouts is tested because it is there."""

import dataclasses
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.datasets import npz_layout
from tests.datasets.layouts import Demo, demos, in_file_order
from tests.datasets.writers import WRITERS, assert_read_in_a_spawned_worker
from vlafit.config import field_help
from vlafit.datasets import (
    Card,
    ChunkDataset,
    Draft,
    EpisodeStore,
    describe,
    layouts,
    load_card,
    open_dataset,
    open_draft,
)
from vlafit.datasets.write import card_text
from vlafit.errors import ConfigError, DataError

NAMES = [*layouts.names(), npz_layout.__name__]
EVERYTHING = in_file_order(demos(3))
LOSSY = ()  # layouts whose writer encodes frames with loss


@dataclasses.dataclass
class Written:
    """A dataset on disk."""

    name: str
    folder: Path
    card: Card

    def open(self) -> EpisodeStore:
        return open_dataset(self.card)

    @cached_property
    def store(self) -> EpisodeStore:
        return self.open()


@pytest.fixture(scope="module")
def all_written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    folder = tmp_path_factory.mktemp("layouts")
    without = [name for name in NAMES if name not in WRITERS]
    assert not without, f"tests/datasets/writers.py has no writer for {without}"
    return {name: Written(name, folder / name, WRITERS[name](folder / name, EVERYTHING)) for name in NAMES}


@pytest.fixture(scope="module", params=NAMES)
def written(request: pytest.FixtureRequest, all_written: dict[str, Written]) -> Written:
    return all_written[request.param]


def matched(store: EpisodeStore) -> list[tuple[int, Demo]]:
    """Pair each episode with the demonstration it was written from; all lengths of a task differ."""
    by = {(demo.instruction, len(demo.actions)): demo for demo in EVERYTHING}
    return [(n, by[info.instruction, info.length]) for n, info in enumerate(store.episodes)]


def test_its_section_is_a_frozen_dataclass_whose_fields_have_defaults_and_help(written: Written):
    section = layouts.load(written.name).Section
    assert section() == section()
    with pytest.raises(dataclasses.FrozenInstanceError):
        section().anything = 1
    assert set(field_help(section)) == {field.name for field in dataclasses.fields(section)}


def test_it_recognises_its_own_files_and_no_others(
    written: Written, all_written: dict[str, Written], tmp_path: Path
):
    recognise = layouts.load(written.name).recognise
    assert recognise(written.folder)
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").write_text("hello")
    (tmp_path / "empty.hdf5").write_bytes(b"")
    for path in (tmp_path / "empty", tmp_path / "note.txt", tmp_path / "nothing"):
        assert not recognise(path)
    for name, other in all_written.items():
        assert recognise(other.folder) == (name == written.name), name


def test_it_reads_what_was_written(written: Written):
    store = written.open()
    assert len(store.episodes) == len(EVERYTHING)
    assert store.embodiment == written.card.embodiment
    for number, demo in matched(store):
        state, actions = store.state(number), store.actions(number)
        assert state.dtype == actions.dtype == np.float32
        np.testing.assert_array_equal(state, demo.state)
        np.testing.assert_array_equal(actions, demo.actions.astype(np.float32))
        for name, frames in (("front", demo.front), ("wrist", demo.wrist)):
            for step in range(len(frames)):
                np.testing.assert_array_equal(store.image(number, step, name), frames[step])


def test_several_frames_at_once_are_the_single_ones_in_the_order_of_the_steps(written: Written):
    store = written.open()
    steps = [3, 0, 0, 2]
    each = np.stack([store.image(1, step, "front") for step in steps])
    np.testing.assert_array_equal(store.images(1, steps, "front"), each)


@settings(max_examples=30)
@given(
    position=st.integers(0, sum(len(demo.actions) for demo in EVERYTHING) - 1),
    chunk=st.integers(1, 9),
    history=st.integers(1, 4),
)
def test_a_window_at_any_index_is_a_slice_of_the_raw_arrays(
    written: Written, position: int, chunk: int, history: int
):
    store = written.store
    sample = ChunkDataset([store], chunk, [[e.id for e in store.episodes]], history)[position]
    number, step = store.index(sample.key[1]), sample.key[2]
    demo = dict(matched(store))[number]
    rows = np.minimum(np.arange(step, step + chunk), len(demo.actions) - 1)
    np.testing.assert_array_equal(sample.actions, demo.actions[rows].astype(np.float32))
    assert sample.is_real.tolist() == [step + k < len(demo.actions) for k in range(chunk)]
    seen = [*sample.observation.past, sample.observation]
    assert len(seen) == min(history, step + 1)
    for earlier, observation in zip(range(step - len(seen) + 1, step + 1), seen, strict=True):
        np.testing.assert_array_equal(observation.state, demo.state[earlier])
        np.testing.assert_array_equal(observation.images["front"], demo.front[earlier])
        np.testing.assert_array_equal(observation.images["wrist"], demo.wrist[earlier])
        assert observation.instruction == demo.instruction


def test_what_it_returns_cannot_be_written_to(written: Written):
    store = written.open()
    for array in (store.state(0), store.actions(0), store.image(0, 0, "wrist"), store.image(0, 0, "front")):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_every_store_goes_to_a_spawned_worker_and_reads_there(all_written: dict[str, Written]):
    assert_read_in_a_spawned_worker([written.open() for written in all_written.values()])


def test_a_pickled_store_is_small_and_a_closed_one_reopens(written: Written):
    store = written.open()
    before = store.image(0, 1, "wrist").copy()
    again = pickle.loads(pickle.dumps(store))  # noqa: S301
    np.testing.assert_array_equal(again.image(0, 1, "wrist"), before)
    store.close()
    np.testing.assert_array_equal(store.image(0, 1, "wrist"), before)


def test_asking_for_what_is_not_there_is_refused_by_name(written: Written):
    store = written.open()
    with pytest.raises(DataError, match="'frnt'; did you mean 'front'"):
        store.image(0, 0, "frnt")
    length = store.episodes[0].length
    for step in (-1, length):
        with pytest.raises(DataError, match=f"step must be .* 0 to {length - 1}, not {step}"):
            store.image(0, step, "front")
    with pytest.raises(DataError, match="no episode 'nothing'"):
        store.index("nothing")


NOT_NUMBERS = [99, -1, 1.0, "0", True, np.float32(0), np.bool_(True), None, [0], 10**30]


@pytest.mark.parametrize("wrong", NOT_NUMBERS, ids=repr)
def test_what_is_no_episode_step_or_length_is_refused_saying_what_is_allowed(written: Written, wrong: Any):
    """A negative number would be an episode from the end, and True the second one, in silence."""
    store, last = written.store, len(EVERYTHING) - 1
    end = store.episodes[0].length - 1
    asked: list[tuple[Callable[[], object], str]] = [
        (lambda: store.sample(wrong, 0, 4), f"episode must be a whole number from 0 to {last}, not "),
        (lambda: store.state(wrong), f"episode must be a whole number from 0 to {last}, not "),
        (lambda: store.actions(wrong), f"episode must be a whole number from 0 to {last}, not "),
        (lambda: store.image(wrong, 0, "front"), f"episode must be a whole number from 0 to {last}, not "),
        (lambda: store.images(wrong, [0], "front"), f"episode must be .* 0 to {last}, not "),
        (lambda: store.sample(0, wrong, 4), f"step must be a whole number from 0 to {end}, not "),
        (lambda: store.image(0, wrong, "front"), f"step must be a whole number from 0 to {end}, not "),
        (lambda: store.images(0, [0, wrong], "front"), f"step must be .* 0 to {end}, not "),
        (lambda: store.index(wrong), "has no episode "),
        (lambda: store.image(0, 0, wrong), "has no camera .*front"),
    ]
    if wrong != 99:  # a length that is allowed
        asked += [
            (lambda: store.sample(0, 0, wrong), "chunk, .* must be a whole number from 1 to "),
            (lambda: store.sample(0, 0, 4, wrong), "history, .* must be a whole number from 1 to "),
        ]
    for call, message in asked:
        with pytest.raises(DataError, match=message):
            call()


def test_the_least_length_is_one_and_numbers_of_numpy_are_numbers(written: Written):
    store = written.store
    for lengths in ((0, 1), (4, 0)):
        with pytest.raises(DataError, match="from 1 to .*, not 0"):
            store.sample(0, 0, *lengths)
    one, two = store.sample(np.int64(1), np.int32(2), np.uint8(3)), store.sample(1, 2, 3)
    assert one.key == two.key and type(one.key[2]) is int
    np.testing.assert_array_equal(one.actions, two.actions)
    np.testing.assert_array_equal(
        store.images(1, np.array([2, 0]), "front"), store.images(1, [2, 0], "front")
    )
    assert store.images(1, [], "front").shape == (0, *store.image(1, 0, "front").shape)
    with pytest.raises(DataError, match="steps must be a list of whole numbers, not 2"):
        store.images(1, 2, "front")  # type: ignore[arg-type]


def test_ids_do_not_depend_on_where_the_files_are(written: Written, tmp_path: Path):
    there = WRITERS[written.name](tmp_path / "a" / "b", EVERYTHING)
    assert [e.id for e in open_dataset(there).episodes] == [e.id for e in written.open().episodes]
    assert len({e.id for e in written.open().episodes}) == len(EVERYTHING)


def test_its_files_are_those_on_the_disk(written: Written):
    files = written.open().files()
    assert files and all(path.is_file() for path in files)


def test_what_the_card_does_not_say_about_the_files_is_refused(written: Written):
    robot = written.card.robot
    wider = replace(robot.cameras[0], width=robot.cameras[0].width + 1)
    changes = [
        replace(robot, cameras=(wider, robot.cameras[1])),
        replace(robot, state=replace(robot.state, dimensions=robot.state.dimensions + 1, labels=())),
        replace(robot, action=replace(robot.action, keys=("nothing",))),
    ]
    if written.name == npz_layout.__name__:
        return  # the smallest layout that can be written checks nothing
    for changed in changes:
        with pytest.raises(DataError):
            open_dataset(replace(written.card, robot=changed)).image(0, 0, "front")


def completed(draft: Draft, card: Card) -> Card:
    """What a reader of the draft does: fill in what the files do not tell."""
    robot = draft.card.robot
    known = {camera.key: camera.channels for camera in card.robot.cameras}
    cameras = tuple(
        replace(camera, channels=known[camera.key])
        if f"robot.cameras.{n}.channels" in draft.missing
        else camera
        for n, camera in enumerate(robot.cameras)
    )
    robot = replace(robot, cameras=cameras, hz=robot.hz or card.robot.hz)
    instruction = card.instruction if "instruction.text" in draft.missing else draft.card.instruction
    return replace(draft.card, robot=robot, instruction=instruction)


def test_a_drafted_card_reads_as_the_files_do_and_survives_being_written(written: Written, tmp_path: Path):
    module = layouts.load(written.name)
    if "describe" not in vars(module):
        return
    draft = describe(written.folder)
    path = tmp_path / "drafted.toml"
    path.write_text(card_text(draft.card, draft.guesses, draft.missing))
    text = path.read_text()
    assert text.count("# GUESS: ") == len(draft.guesses)
    assert text.count("# FILL IN: ") == len(draft.missing)
    if draft.missing:
        with pytest.raises(DataError, match=f"(?s)needs a card.*{next(iter(draft.missing))}"):
            load_card(written.folder)
        with pytest.raises((ConfigError, DataError)):
            open_dataset(path)
        path.write_text(card_text(completed(draft, written.card)))
    else:
        assert load_card(written.folder).embodiment == draft.card.embodiment
    store, expected = open_dataset(path), written.open()
    assert [e.id for e in store.episodes] == [e.id for e in expected.episodes]
    assert [e.instruction for e in store.episodes] == [e.instruction for e in expected.episodes]
    assert {c.shape for c in store.embodiment.cameras} == {c.shape for c in expected.embodiment.cameras}
    if draft.card.robot.action.keys == written.card.robot.action.keys and not written.card.robot.action.scale:
        np.testing.assert_array_equal(store.actions(1), expected.actions(1))
    assert [e.id for e in open_draft(draft).episodes] == [e.id for e in expected.episodes]


# -------------------------------------------------------------------------------------- how layouts are found


def test_a_layout_of_another_installed_package_is_found_by_its_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    info = tmp_path / "site" / "outside-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vlafit.layouts]\nnpz = tests.datasets.npz_layout\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    made = WRITERS[npz_layout.__name__](tmp_path / "set", EVERYTHING)
    assert layouts.load("npz") is npz_layout
    assert layouts.recognise(tmp_path / "set") == "npz"
    assert len(open_dataset(replace(made, layout="npz")).episodes) == len(EVERYTHING)


def test_a_card_names_a_layout_outside_the_package_by_its_dotted_path(tmp_path: Path):
    made = WRITERS[npz_layout.__name__](tmp_path / "set", EVERYTHING)
    path = tmp_path / "card.toml"
    path.write_text(card_text(made) + "\n[npz_layout]\nsentence_key = 'sentence'\n")
    assert len(open_dataset(path).episodes) == len(EVERYTHING)
    path.write_text(card_text(made) + "\n[npz_layout]\nsentence_kez = 'sentence'\n")
    with pytest.raises(ConfigError, match=r"\[npz_layout\].*did you mean 'sentence_key'"):
        load_card(path)


@pytest.mark.parametrize("place", ["set", "./set", "set/../set"])
def test_an_outside_layout_describes_the_same_files_by_a_relative_path(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
):
    made = WRITERS[npz_layout.__name__](tmp_path / "set", EVERYTHING)
    described = lambda path: Draft(replace(made, path=str(path)))  # noqa: E731
    monkeypatch.setattr(npz_layout, "describe", described, raising=False)
    monkeypatch.chdir(tmp_path)
    expected = describe(tmp_path / "set", npz_layout.__name__)
    draft = describe(Path(place), npz_layout.__name__)
    assert draft == expected
    assert open_draft(draft).files() == open_draft(expected).files()


def test_files_that_no_layout_recognises_are_refused_naming_those_tried(tmp_path: Path):
    (tmp_path / "note.txt").write_text("hello")
    with pytest.raises(DataError, match="note.txt.*libero"):
        layouts.recognise(tmp_path / "note.txt")
    with pytest.raises(DataError, match="nothing is there"):
        layouts.recognise(tmp_path / "missing")


def test_two_episodes_of_one_id_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = WRITERS[npz_layout.__name__](tmp_path / "set", EVERYTHING)
    real = npz_layout.NpzStore(made)
    real.episodes = (*real.episodes[:2], replace(real.episodes[2], id=real.episodes[0].id))
    monkeypatch.setattr(npz_layout, "open", lambda card: real)
    with pytest.raises(DataError, match=f"not unique: {real.episodes[0].id}"):
        open_dataset(made)
