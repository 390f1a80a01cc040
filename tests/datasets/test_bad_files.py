"""What a user can get wrong with files, and what they are told."""

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.datasets import lerobot_files
from tests.datasets.layouts import (
    TASKS,
    card,
    demos,
    robomimic_card,
    write_libero,
    write_one,
    write_robomimic,
)
from vlafit.datasets import Card, open_dataset
from vlafit.datasets.card import ColumnCard, ExpectCard, InstructionCard, RecordSpec
from vlafit.datasets.layouts import libero
from vlafit.errors import DataError

NAME = "turn_on_the_stove_demo.hdf5"
DEMO = demos(1)[0]  # four steps


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_one(tmp_path / NAME, DEMO)


def replaced(key: str, value: np.ndarray) -> Callable[[h5py.File], None]:
    def spoil(file: h5py.File) -> None:
        del file[f"data/demo_0/{key}"]
        file[f"data/demo_0/{key}"] = value

    return spoil


def changed(key: str, index: tuple[int, int], value: float) -> Callable[[h5py.File], None]:
    def spoil(file: h5py.File) -> None:
        file[f"data/demo_0/{key}"][index] = value  # type: ignore[index]

    return spoil


def removed(key: str) -> Callable[[h5py.File], None]:
    def spoil(file: h5py.File) -> None:
        del file[key]

    return spoil


def emptied(file: h5py.File) -> None:
    for key in ("actions", "obs/ee_pos", "obs/gripper_states", "obs/agentview_rgb", "obs/eye_in_hand_rgb"):
        value = file[f"data/demo_0/{key}"][:0]  # type: ignore[index]
        replaced(key, value)(file)


def renamed_camera(file: h5py.File) -> None:
    file.move("data/demo_0/obs/agentview_rgb", "data/demo_0/obs/agent_view_rgb")


def without_attrs(file: h5py.File) -> None:
    del file["data"].attrs["problem_info"]


def with_a_wrong_count(file: h5py.File) -> None:
    file["data/demo_0"].attrs["num_samples"] = 7


def with_attrs(text: str) -> Callable[[h5py.File], None]:
    def spoil(file: h5py.File) -> None:
        file["data"].attrs["problem_info"] = text

    return spoil


CASES: list[tuple[str, Callable[[h5py.File], None], str]] = [
    ("no group data", removed("data"), r"no group 'data'.*layout"),
    ("no demonstrations", removed("data/demo_0"), "holds no demonstrations"),
    ("key missing", removed("data/demo_0/obs/ee_pos"), r"demo_0: no dataset 'obs/ee_pos'"),
    ("key misspelt", renamed_camera, "no dataset 'obs/agentview_rgb'; did you mean 'obs/agent_view_rgb'"),
    (
        "NaN in the state",
        changed("obs/ee_pos", (2, 1), np.nan),
        "demo_0: obs/ee_pos holds nan at step 2, dimension 1",
    ),
    (
        "infinite action",
        changed("actions", (3, 0), np.inf),
        "demo_0: actions holds inf at step 3, dimension 0",
    ),
    (
        "beyond float32",
        changed("actions", (1, 0), 1e300),
        r"demo_0: actions holds 1e\+300 at step 1, .*float32",
    ),
    ("integers", replaced("actions", np.zeros((4, 4), np.int64)), "actions is int64"),
    ("text", replaced("actions", np.full((4, 4), b"x")), r"actions is \|S1"),
    (
        "one axis",
        replaced("obs/gripper_states", np.zeros(4)),
        r"state has 4 .*gripper_states 1\),.* 5",
    ),
    (
        "three axes",
        replaced("obs/gripper_states", np.zeros((4, 1, 2))),
        r"gripper_states is float64 \(4, 1",
    ),
    (
        "too few actions",
        replaced("actions", np.zeros((4, 3))),
        r"action has 3 dimensions \(actions 3\), the card says 4",
    ),
    (
        "too wide a state",
        replaced("obs/ee_pos", np.zeros((4, 6))),
        r"state has 8 dimensions \(obs/ee_pos 6, .* says 5",
    ),
    ("columns differ", replaced("actions", np.zeros((3, 4))), r"differ in length \(obs/ee_pos 4.*actions 3"),
    ("state parts differ", replaced("obs/ee_pos", np.zeros((9, 3))), r"differ in length \(obs/ee_pos 9"),
    (
        "frames are missing",
        replaced("obs/eye_in_hand_rgb", np.zeros((2, 6, 5, 3), np.uint8)),
        "differ in length.*eye_in_hand_rgb 2",
    ),
    (
        "frames of another size",
        replaced("obs/agentview_rgb", np.zeros((4, 5, 6, 3), np.uint8)),
        r"frames \(5, 6, 3\), the card says \(6, 5, 3\) for camera 'front'",
    ),
    ("float frames", replaced("obs/agentview_rgb", np.zeros((4, 6, 5, 3), np.float32)), "a camera is uint8"),
    ("grey frames", replaced("obs/agentview_rgb", np.zeros((4, 6, 5), np.uint8)), "a camera is uint8"),
    ("empty episode", emptied, "demo_0: the episode is empty"),
    ("another length", with_a_wrong_count, "demo_0: has 4 actions, its attribute num_samples says 7"),
    ("no instruction", without_attrs, 'no attribute problem_info.*"filename" or "card"'),
    ("instruction not JSON", with_attrs("{"), "not JSON with a language_instruction"),
    ("instruction not there", with_attrs('{"language": "x"}'), "not JSON with a language_instruction"),
    ("instruction empty", with_attrs('{"language_instruction": " "}'), "language_instruction is empty"),
]


@pytest.mark.parametrize(("spoil", "message"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_a_spoilt_file_is_refused_when_opened_saying_where(file: Path, spoil, message: str):
    with h5py.File(file, "r+") as handle:
        spoil(handle)
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(card(file))
    assert str(file) in str(caught.value)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "damage",
    [truncate, lambda p: p.write_bytes(b"not HDF5 at all"), lambda p: p.write_bytes(b"")],
    ids=["truncated", "text", "empty"],
)
def test_a_file_that_is_cut_short_or_not_hdf5_is_refused(file: Path, damage: Callable[[Path], None]):
    damage(file)
    with pytest.raises(DataError, match="cannot be read as HDF5") as caught:
        open_dataset(card(file))
    assert str(file) in str(caught.value)


def test_damaged_data_inside_a_compressed_file_is_refused(tmp_path: Path):
    path = tmp_path / NAME
    with h5py.File(write_one(path, DEMO), "r+") as handle:
        del handle["data/demo_0/actions"]
        made = handle.create_dataset("data/demo_0/actions", data=DEMO.actions, compression="gzip")
        where = made.id.get_chunk_info(0)
    raw = bytearray(path.read_bytes())
    raw[where.byte_offset : where.byte_offset + where.size] = b"\xff" * where.size
    path.write_bytes(bytes(raw))
    with pytest.raises(DataError, match="demo_0: actions cannot be read"):
        open_dataset(card(path))


def test_a_list_of_sentences_is_joined_as_libero_does(file: Path):
    with h5py.File(file, "r+") as handle:
        with_attrs('{"language_instruction": ["turn on", " the stove"]}')(handle)
    assert open_dataset(card(file)).episodes[0].instruction == "turn on the stove"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: card(p / "nothing"), "nothing is at '.*nothing'.*`path`"),
        (lambda p: card(p), r"holds no \.hdf5 or \.h5 file"),
        (lambda p: card(p / "*.hdf5"), "holds no"),
        (lambda p: card(p / "nothing", source="get it at a.b"), "nothing is at.*; get it at a.b"),
        (
            lambda p: card(p / "nothing", record=RecordSpec("metaworld", ("a",), 3)),
            "no recordings at.*vlafit record small",
        ),
    ],
)
def test_missing_files_are_refused_with_what_to_do(
    tmp_path: Path, make: Callable[[Path], Card], message: str
):
    with pytest.raises(DataError, match=message):
        open_dataset(make(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expect": ExpectCard(episodes=5)}, "has 4 episodes in 2 files, its card expects 5"),
        ({"expect": ExpectCard(frames=17)}, "has 18 frames, its card expects 17"),
        ({"record": RecordSpec("metaworld", TASKS, 3)}, "expects 6.*finish recording with: vlafit record"),
    ],
)
def test_counts_that_the_card_does_not_expect_are_refused(
    tmp_path: Path, changes: dict[str, object], message: str
):
    folder = write_libero(tmp_path / "set", demos(2))
    with pytest.raises(DataError, match=message):
        open_dataset(card(folder, **changes))
    right = {"expect": ExpectCard(4, 18), "record": RecordSpec("metaworld", TASKS, 2)}
    assert len(open_dataset(card(folder, **right)).episodes) == 4


def test_a_filter_key_that_is_not_there_or_names_missing_demonstrations_is_refused(tmp_path: Path):
    folder = write_robomimic(tmp_path / "set", demos(5))
    with pytest.raises(DataError, match="filter key 'trian'.*'train'"):
        open_dataset(robomimic_card(folder, mask="trian"))
    for path in folder.iterdir():
        with h5py.File(path, "r+") as handle:
            del handle["data/demo_1"]
    with pytest.raises(DataError, match="'train'.*missing: demo_1"):
        open_dataset(robomimic_card(folder, mask="train"))
    for path in folder.iterdir():
        with h5py.File(path, "r+") as handle:
            del handle["mask"]
    with pytest.raises(DataError, match="has no filter keys"):
        open_dataset(robomimic_card(folder, mask="train"))


def test_a_file_for_which_the_card_has_no_sentence_is_refused(file: Path):
    said = InstructionCard("card", files={"turn_on_the_stove": "turn it on"})
    with pytest.raises(DataError, match="'turn_on_the_stove_demo'.*did you mean 'turn_on_the_stove'"):
        open_dataset(card(file, instruction=said))
    said = replace(said, text="do as you like")
    assert open_dataset(card(file, instruction=said)).episodes[0].instruction == "do as you like"


def test_a_key_that_is_a_group_is_not_a_column(file: Path):
    robot = card(file).robot
    with pytest.raises(DataError, match="no dataset 'obs'"):
        open_dataset(card(file, robot=replace(robot, state=ColumnCard(("obs",), 5))))


def test_asking_for_what_a_store_does_not_have_is_refused_by_name(file: Path):
    store = open_dataset(card(file))
    with pytest.raises(DataError, match="camera 'frnt'.*'front'"):
        store.image(0, 0, "frnt")
    for step in (-1, 4):
        with pytest.raises(DataError, match=f"step must be .* 0 to 3, not {step}"):
            store.image(0, step, "front")
    with pytest.raises(DataError, match="no episode 'demo_0'"):
        store.index("demo_0")


def test_bytes_that_rot_inside_a_file_end_in_an_error_that_names_it(tmp_path: Path):
    whole = write_one(tmp_path / NAME, DEMO, chunks=True, compression="gzip").read_bytes()
    rng = np.random.default_rng(0)
    told = 0
    for number in range(120):
        rotten = bytearray(whole)
        at = int(rng.integers(16, len(whole) - 64))
        rotten[at : at + 64] = rng.bytes(64)
        path = tmp_path / str(number) / NAME
        path.parent.mkdir()
        path.write_bytes(rotten)
        try:
            store = open_dataset(card(path))
            for step in range(store.episodes[0].length):
                store.image(0, step, "front")
            store.close()
        except DataError as error:
            told += 1
            assert NAME in str(error)
    assert told > 10  # the rest hit pixels without a checksum, or nothing at all


@pytest.mark.case(
    section="data",
    report="KeyError: Unable to synchronously open object",
    user_has="an HDF5 file whose header is damaged",
    now="one sentence with file and key, and exit status 2",
)
def test_a_damaged_header_is_refused_by_file_and_key(file: Path) -> None:
    with h5py.File(file) as handle:
        actions = handle["data/demo_0/actions"]
        assert isinstance(actions, h5py.Dataset)
        sizes = struct.pack("<4Q", *actions.shape, *actions.shape)  # of the dimensions, then their limits
    content = bytearray(file.read_bytes())
    content[content.index(sizes) + 12] = 0xFF  # in the second dimension's
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"maxdim") as caught:
        open_dataset(card(file))
    assert all(fact in str(caught.value) for fact in (str(file), "demo_0: actions"))
    with pytest.raises(DataError, match=r"maxdim") as caught:
        libero.describe(file)
    assert str(file) in str(caught.value)


@pytest.mark.case(
    section="data",
    report="`did you mean` a state, where a camera is missing",
    user_has="a camera's key that is nearest to the name of a state, or a state's to a camera's",
    now="a camera's key is answered with cameras, a column's with columns",
)
@pytest.mark.parametrize("layout", ["hdf5", "lerobot"])
def test_a_missing_camera_never_suggests_a_state_nor_a_state_a_camera(
    file: Path, tmp_path: Path, layout: str
) -> None:
    if layout == "hdf5":
        whole, camera, column, state, picture = card(file), "obs/ee_po", "obs/agentview_rg", "ee_pos", "rgb"
    else:
        whole = lerobot_files.write(tmp_path / "dataset", demos(2), "v2.1")
        camera, column, state, picture = "observation.stat", "observation.images.fron", "state'", "images"
    robot = whole.robot
    wrong = replace(robot, cameras=(replace(robot.cameras[0], key=camera), *robot.cameras[1:]))
    with pytest.raises(DataError, match=f"'{camera}'") as caught:
        open_dataset(replace(whole, robot=wrong))
    _, hint = str(caught.value).split(f"'{camera}'")
    assert state not in hint and picture in hint
    wrong = replace(robot, action=replace(robot.action, keys=(column,)))
    with pytest.raises(DataError, match=f"'{column}'") as caught:
        open_dataset(replace(whole, robot=wrong))
    _, hint = str(caught.value).split(f"'{column}'")
    assert picture not in hint and state.strip("'") in hint
