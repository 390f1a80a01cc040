"""Dataset, checkpoint and recipe agree, or the error names both sides and the remedy."""

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from tests.agreement.world import ROBOT, cameras, checkpoint, dataset
from vlafit.agreement import Agreement, Party, agree, protocol_items
from vlafit.agreement.camera_map import hands, propose, table, to_themselves
from vlafit.agreement.values import FILE, read
from vlafit.cli.console import agreement_table
from vlafit.errors import ConfigError, EmbodimentError
from vlafit.recipe import AdaptRecipe
from vlafit.types import Embodiment, Feature, differences

PAGE = Path(__file__).parents[2] / "docs" / "your_robot.md"
THREE = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
OPENPI = Party("checkpoint", "pi0_base", None, None, THREE, frame_sizes_known=False)


def agreed(own: Party, other: Party | None, fresh: bool = False, **adapt) -> Agreement:
    return agree(own, other, AdaptRecipe(**adapt), fresh_statistics=fresh)


def conflicts(agreement: Agreement) -> set[str]:
    return {item.name for item in agreement.conflicts}


def chosen(agreement: Agreement) -> set[str]:
    return {item.name for item in agreement.chosen}


def test_the_same_robot_agrees_on_every_point():
    agreement = agreed(dataset(), checkpoint())
    agreement.require()
    assert {item.status for item in agreement.items} == {"same"}
    assert (agreement.cameras, agreement.relative) == (("front", "wrist"), ())


# --------------------------------------------------------------------------------------------- relative


@pytest.mark.case(
    section="data",
    report="loss falls, the robot moves to wrong places",
    user_has="a card with `relative`, a checkpoint without, or the reverse",
    now="an error with both masks; `adapt.actions` chooses",
)
@pytest.mark.parametrize(("own", "other"), [((True, True, False), ()), ((), (True, True, False))])
def test_relative_on_one_side_only_is_an_error_that_names_both_sides(own, other):
    with pytest.raises(EmbodimentError) as error:
        agreed(dataset(own), checkpoint(other)).require()
    text = str(error.value)
    assert "relative in dimensions 0, 1" in text and "absolute" in text and "actions = " in text


@pytest.mark.case(
    section="data",
    report="relative actions of a robot whose state lists its columns in another order",
    user_has="an action relative to the state of the same number, whose name is another's",
    now="an error naming both columns and the right one, whichever side makes it relative",
)
@pytest.mark.parametrize("adapt", ["same", "data", "checkpoint"])
def test_an_action_is_never_relative_to_a_state_of_another_name(adapt: str):
    state = replace(ROBOT.state, labels=("gripper", "shoulder", "elbow"))
    mask = (True, True, False)
    own, other = {"same": (mask, mask), "data": (mask, ()), "checkpoint": ((), mask)}[adapt]
    with pytest.raises(EmbodimentError) as error:
        agreed(
            dataset(own, state=state),
            checkpoint(other, state=replace(state, labels=())),
            fresh=True,
            actions="" if adapt == "same" else adapt,
        ).require()
    for word in ("action 'shoulder'", "state 'gripper'", "state 'shoulder' is dimension 1", "same place"):
        assert word in str(error.value)


def test_an_action_is_relative_to_a_state_whose_name_differs_only_in_the_column():
    state = replace(ROBOT.state, labels=("Shoulder.pos", "elbow.position", "width"))
    agreed(dataset((True, True, False), state=state), None).require()


def test_a_mask_is_put_on_dimensions_of_the_same_name_whatever_their_order():
    other = replace(ROBOT.action, labels=("gripper", "elbow", "shoulder"))
    theirs = checkpoint((False, True, True), action=other, state=other)
    agreement = agreed(dataset(), theirs, fresh=True, robot=True, actions="checkpoint")
    agreement.require()
    assert agreement.relative == (True, True, False)
    agreed(dataset((True, True, False)), theirs, fresh=True, robot=True).require()  # the same by name
    strange = replace(ROBOT.action, labels=("x", "y", "z"))
    with pytest.raises(EmbodimentError, match="actions shoulder, elbow, gripper; checkpoint: actions x, y"):
        agreed(
            dataset(),
            checkpoint((False, True, True), action=strange),
            fresh=True,
            robot=True,
            actions="checkpoint",
        ).require()


def test_the_checkpoints_actions_may_be_chosen_with_either_statistics():
    for fresh in (False, True):
        agreement = agreed(dataset(), checkpoint((True, True, False)), fresh, actions="checkpoint")
        assert agreement.relative == (True, True, False) and chosen(agreement) == {"relative actions"}


def test_the_cards_actions_may_be_chosen_only_with_fresh_statistics():
    own, other = dataset((True, True, False)), checkpoint(())
    assert agreed(own, other, True, actions="data").relative == (True, True, False)
    refused = agreed(own, other, False, actions="data")
    assert conflicts(refused) == {"relative actions"}
    assert 'data.statistics = "data"' in refused.conflicts[0].fix


def test_a_mask_of_another_width_is_never_put_on_the_robot():
    narrow = replace(ROBOT.action, shape=(2,), labels=("shoulder", "elbow"))
    other = checkpoint((True, True, False))
    agreement = agreed(dataset((True, True), action=narrow), other, True, robot=True, actions="checkpoint")
    assert conflicts(agreement) == {"relative actions"}
    assert agreed(dataset((True, True), action=narrow), other, True, robot=True, actions="data").relative == (
        True,
        True,
    )


def test_where_the_checkpoint_does_not_say_the_card_holds_and_a_choice_is_refused():
    agreement = agreed(dataset((True, True, True)), checkpoint(None))
    item = next(item for item in agreement.items if item.name == "relative actions")
    assert (agreement.relative, item.status) == ((True, True, True), "assumed")
    with pytest.raises(ConfigError, match="adapt.actions = 'data'.*does not say"):
        agreed(dataset(), checkpoint(None), True, actions="data")


def test_a_conversion_inside_the_policy_is_refused_unless_robot_and_statistics_are_new():
    other = replace(checkpoint(), conversions=("adapt_to_pi_aloha is true: it converts joints",))
    for fresh, robot in ((False, False), (False, True), (True, False)):
        assert conflicts(agreed(dataset(), other, fresh, robot=robot)) == {"conversion"}
    assert chosen(agreed(dataset(), other, True, robot=True)) == {"conversion"}


# ---------------------------------------------------------------------------------------------- cameras


@pytest.mark.case(
    section="data",
    report="cameras exchanged",
    user_has="the same cameras in another order",
    now="matched by name, never by order",
)
def test_cameras_are_matched_by_name_whatever_their_order():
    agreement = agreed(dataset(cameras=cameras("wrist", "front")), checkpoint())
    agreement.require()
    assert agreement.cameras == ("front", "wrist") and not agreement.chosen


@pytest.mark.case(
    section="data",
    report="one view is black",
    user_has="one of two cameras, or another name",
    now='an error that proposes `adapt.cameras`; `""` leaves a slot empty',
)
def test_only_one_of_two_cameras_is_an_error_until_the_other_slot_is_said_to_be_empty():
    own = dataset(cameras=cameras("wrist"))
    refused = agreed(own, checkpoint())
    assert conflicts(refused) == {"camera slot 0"}
    assert 'front = "", wrist = "wrist"' in refused.conflicts[0].fix
    agreement = agreed(own, checkpoint(), cameras={"front": ""})
    agreement.require()
    assert agreement.cameras == ("", "wrist")


def test_a_camera_without_a_slot_is_an_error_until_the_used_ones_are_named():
    own = dataset(cameras=cameras("front", "wrist", "side"))
    assert conflicts(agreed(own, checkpoint())) == {"camera side"}
    agreement = agreed(own, checkpoint(), cameras={"front": "side"})
    agreement.require()
    assert agreement.cameras == ("side", "wrist") and "camera front" in chosen(agreement)


def test_openpis_slots_are_filled_by_name_only_and_its_sizes_are_not_compared():
    own = dataset(cameras=cameras("top", "wrist_left", "wrist_right"))
    refused = agreed(own, OPENPI)
    assert conflicts(refused) >= {"camera slot 0", "camera slot 1", "camera slot 2"}
    pairs = dict(zip(THREE, ("top", "wrist_left", "wrist_right"), strict=True))
    assert all(f'{slot} = "{name}"' in refused.conflicts[0].fix for slot, name in pairs.items())
    agreement = agreed(own, OPENPI, cameras=pairs)
    agreement.require()
    assert agreement.cameras == ("top", "wrist_left", "wrist_right")


@pytest.mark.parametrize(
    ("slots", "recorded", "proposed"),
    [
        # Names tell: the same words and hand in another order or spelling, or the only ones left of a place.
        (("cam_high", "left_wrist_0_rgb", "rightWrist"), ("wrist_r", "high", "wrist_l"),
         {"cam_high": "high", "left_wrist_0_rgb": "wrist_l", "rightWrist": "wrist_r"}),
        (("base_0_rgb", "wrist"), ("gripper_cam", "front"), {"base_0_rgb": None, "wrist": None}),
        (("base_0_rgb", "wrist"), ("wrist_cam", "front"), {"base_0_rgb": "front", "wrist": "wrist_cam"}),
        (("wrist", "front"), ("front",), {"wrist": "", "front": "front"}),
        # Names do not tell, whatever the order.
        (("front", "wrist"), ("cam0", "cam1"), {"front": None, "wrist": None}),
        (("left_wrist", "right_wrist"), ("wrist_1", "wrist_2"), {"left_wrist": None, "right_wrist": None}),
        (("front", "left_wrist"), ("front", "right_wrist"), {"front": "front", "left_wrist": None}),
        (("left_wrist",), ("left_wrist_1", "left_wrist_2"), {"left_wrist": None}),
        (("left_wrist",), ("left_shoulder",), {"left_wrist": None}),
        (("front", "top"), ("side", "top"), {"front": None, "top": "top"}),
    ],
)  # fmt: skip
def test_only_cameras_that_their_names_tell_are_proposed(slots, recorded, proposed):
    assert propose(slots, recorded, {}) == proposed
    agreement = agreed(dataset(cameras=cameras(*recorded)), checkpoint(slots=slots, cameras=cameras(*slots)))
    unknown = [slot for slot, name in proposed.items() if name is None]
    fix = {one.fix for one in agreement.conflicts if one.name.startswith("camera slot")}.pop()
    assert all(f'{slot} = "CAMERA"' in fix for slot in unknown)
    assert ("order is not known" in fix) == bool(unknown)
    with pytest.raises(EmbodimentError) as error:
        agreement.require()
    for slot, name in proposed.items():
        option = f"--adapt.cameras.{slot} {'CAMERA' if name is None else name or repr('')}"
        assert (option in str(error.value)) == bool(any(proposed.values()) or unknown), option
    assert ("in the place of each CAMERA:" in str(error.value)) == bool(unknown)


def test_a_proposal_keeps_what_the_recipe_maps_and_says_resize_where_frames_have_another_size():
    own = dataset(cameras=cameras("front", "wrist", size=(24, 32)))
    fix = agreed(own, checkpoint(), cameras={"front": "wrist"}).conflicts[1].fix
    assert 'cameras = { front = "wrist", wrist = "CAMERA" } and resize = true' in fix
    refused = agreed(dataset(cameras=cameras("wrist", size=(24, 32))), checkpoint())
    with pytest.raises(EmbodimentError, match="--adapt.resize true"):
        refused.require()


@pytest.mark.case(
    section="data",
    report="left and right hand exchanged",
    user_has="a map from a left to a right camera",
    now="an error; correct the map or the name",
)
@pytest.mark.parametrize(
    "other",
    ["wrist_right", "RightWrist", "right_cam", "rightwrist", "wrist2_r", "camera_R", "camR", "rh", "rwrist",
     "wristr", "R", "images.right", "r1", "wrist_R2", "cam_r1_rgb"],
)  # fmt: skip
def test_a_wrong_hand_is_an_error_that_no_map_allows(other: str):
    own = dataset(cameras=cameras("base_0_rgb", other))
    wrong = {"left_wrist_0_rgb": other, "right_wrist_0_rgb": ""}
    agreement = agreed(own, OPENPI, cameras=wrong)
    assert conflicts(agreement) == {"camera slot 1"}
    assert other in agreement.conflicts[0].fix and "left" in agreement.conflicts[0].fix


@pytest.mark.parametrize(
    ("here", "there", "same"),
    [("rad", "Radians", True), ("deg", "degrees", True), ("m", "mm", False), ("degree", "radian", False)],
)
def test_a_unit_is_the_same_by_symbol_and_by_name_and_another_may_be_converted(here, there, same):
    column = replace(ROBOT.state, unit=here)
    agreement = agreed(dataset(state=column), checkpoint(state=replace(column, unit=there)))
    assert conflicts(agreement) == (set() if same else {"state unit"})
    mine, theirs = (replace(ROBOT, state=replace(column, unit=unit)) for unit in (here, there))
    assert same == (not differences(mine, theirs))
    if not same:
        assert "`scale`" in agreement.conflicts[0].fix and here in agreement.conflicts[0].sides["dataset"]


def test_a_camera_that_takes_anothers_place_is_named_where_its_own_slot_is_empty():
    agreement = agreed(dataset(), checkpoint(), cameras={"wrist": "front"})
    (slot,) = [one for one in agreement.conflicts if one.name == "camera slot 0"]
    assert "front takes the place of wrist" in slot.sides["dataset"]


@pytest.mark.parametrize(
    "name", ["cam_L515", "l515", "rgb", "camRGB", "alarm", "R1_head", "leftover_view", "base_0_rgb", "D435"]
)
def test_a_name_with_the_letters_l_or_r_is_no_hand(name: str):
    assert hands(name) == set()


def test_a_unit_is_shown_as_each_side_writes_it():
    there = checkpoint(state=replace(ROBOT.state, unit="Radians"))
    (item,) = [one for one in agreed(dataset(), there).items if one.name == "state unit"]
    assert (dict(item.sides), item.value) == ({"dataset": "rad", "checkpoint": "Radians"}, "rad")


@pytest.mark.case(
    section="data",
    report="cameras exchanged in the card",
    user_has='`name = "cam_high"` with `key = "obs/cam_wrist_rgb"`, another camera\'s name',
    now="an error with both names; `adapt.cameras` confirms it",
)
@pytest.mark.parametrize(
    ("keys", "wrong"),
    [
        ({"front": "obs/wrist_rgb", "wrist": "obs/front_rgb"}, {0, 1}),
        ({"front": "obs/cam0/wrist/rgb", "wrist": "obs/cam1/rgb"}, {0}),
        ({"front": "observation.images.front", "wrist": "observation.images.front_wrist"}, set()),
        ({"front": "obs/a_rgb", "wrist": "obs/b_rgb"}, set()),
    ],
)
def test_a_camera_that_reads_the_key_of_another_is_an_error_unless_it_is_mapped(keys, wrong):
    own = replace(dataset(), keys=keys)
    agreement = agreed(own, checkpoint())
    assert conflicts(agreement) == {f"camera slot {slot}" for slot in wrong}
    assert all("which has the name of camera" in one.sides["dataset"] for one in agreement.conflicts)
    agreed(own, checkpoint(), cameras={"front": "front", "wrist": "wrist"}).require()
    fresh = {one.name for one in agreed(own, None).items if one.status == "differs"}
    assert fresh == {("camera front", "camera wrist")[slot] for slot in wrong}


def test_a_camera_that_reads_the_other_hand_is_an_error():
    own = replace(dataset(cameras=cameras("left_wrist")), keys={"left_wrist": "obs/r_wrist_rgb"})
    (item,) = agreed(own, checkpoint(slots=("left_wrist",), cameras=cameras("left_wrist"))).conflicts
    assert "other hand" in item.sides["dataset"]


@pytest.mark.parametrize(("states", "actions"), [((), ()), (("a", "b", "c"), ()), ((), ("a", "b", "c"))])
def test_relative_actions_without_names_on_both_sides_are_marked_as_assumed(states, actions):
    named = {
        "state": replace(ROBOT.state, labels=states),
        "action": replace(ROBOT.action, labels=actions),
    }
    mask = (True, True, False)
    for there in (None, checkpoint(mask, **named)):
        (item,) = [i for i in agreed(dataset(mask, **named), there).items if i.name == "relative actions"]
        assert item.status == "assumed" and "action i is taken to be relative to state i" in item.reason
    chosen = agreed(dataset((), **named), checkpoint(mask, **named), actions="checkpoint")
    (item,) = [i for i in chosen.items if i.name == "relative actions"]
    assert item.status == "chosen" and "relative to state i" in item.reason
    (item,) = [i for i in agreed(dataset(mask), None).items if i.name == "relative actions"]
    assert item.status == "same"


def test_upright_is_no_hand():
    own = dataset(cameras=cameras("base_0_rgb", "upright"))
    maps = {"left_wrist_0_rgb": "upright", "right_wrist_0_rgb": ""}
    agreed(own, OPENPI, cameras=maps).require()


@pytest.mark.case(
    section="data",
    report="blurred or stretched frames",
    user_has="another frame size than the checkpoint's",
    now="an error, or `adapt.resize`",
)
def test_another_frame_size_is_an_error_unless_resize_is_said():
    own = dataset(cameras=cameras("front", "wrist", size=(480, 640)))
    refused = agreed(own, checkpoint())
    assert conflicts(refused) == {"camera slot 0", "camera slot 1"}
    assert "480x640" in str(refused.conflicts[0].sides) and "48x64" in str(refused.conflicts[0].sides)
    assert chosen(agreed(own, checkpoint(), resize=True)) == {"camera slot 0", "camera slot 1"}


@pytest.mark.parametrize(
    ("maps", "words"),
    [
        ({"nope": "front"}, "has no camera 'nope'; it has: front, wrist$"),
        ({"frnt": "front"}, "no camera 'frnt'.*did you mean 'front'"),
        ({"front": "wrst"}, "no camera 'wrst'.*did you mean 'wrist'"),
        ({"front": "wrist", "wrist": "wrist"}, "'wrist' is mapped to more than one"),
        ({"front": "", "wrist": ""}, "leaves every camera"),
    ],
)
def test_a_map_of_cameras_that_cannot_be_is_refused(maps: dict[str, str], words: str):
    with pytest.raises(ConfigError, match=words):
        agreed(dataset(), checkpoint(), cameras=maps)


def test_without_a_checkpoint_there_is_nothing_to_map():
    assert agreed(dataset(), None, True).cameras == ("front", "wrist")
    with pytest.raises(ConfigError, match="adapt.cameras"):
        agreed(dataset(), None, True, cameras={"front": "wrist"})


# ---------------------------------------------------------------------------------------- robot and control


@pytest.mark.case(
    section="data",
    report="a robot with more joints",
    user_has="other dimensions, names, units or control mode",
    now='an error; `adapt.robot` with `data.statistics = "data"`',
)
@pytest.mark.parametrize(
    ("changes", "item"),
    [
        ({"state": Feature("state", (4,), "rad")}, "state dimensions"),
        ({"action": Feature("action", (2,), "rad")}, "action dimensions"),
        ({"state": Feature("state", (3,), "deg")}, "state unit"),
        ({"action": Feature("action", (3,), "rad", ("elbow", "shoulder", "gripper"))}, "action names"),
        ({"control": "joint_velocity"}, "control mode"),
    ],
)
def test_another_robot_needs_adapt_robot_and_statistics_of_its_own(changes: dict, item: str):
    own = dataset(**changes)
    for fresh, robot in ((False, False), (False, True), (True, False)):
        assert conflicts(agreed(own, checkpoint(), fresh, robot=robot)) == {item}
    agreement = agreed(own, checkpoint(), True, robot=True)
    agreement.require()
    assert chosen(agreement) == {item}


def test_another_rate_is_an_error_unless_it_is_said():
    assert conflicts(agreed(dataset(hz=15.0), checkpoint())) == {"control rate"}
    assert chosen(agreed(dataset(hz=15.0), checkpoint(), robot=True)) == {"control rate"}


def test_a_renderer_that_one_side_or_neither_states_is_assumed_saying_which():
    def why(here: str, there: str) -> str:
        agreement = agreed(dataset(renderer=here), checkpoint(renderer=there))
        (item,) = (one for one in agreement.items if one.name == "renderer")
        assert item.status == "assumed" and item.value == here + there
        return item.reason

    assert why("", "") == "neither side says"
    assert why("ray", "") == "the checkpoint does not say"
    assert why("", "ray") == "the dataset does not say"
    another = agreed(dataset(renderer=""), checkpoint(renderer="ray"), robot=True)
    (item,) = (one for one in another.items if one.name == "renderer")
    assert (item.value, item.status) == ("not stated", "chosen"), "a real robot is not ray cast"


def test_what_a_side_does_not_say_is_assumed_and_shown():
    agreement = agreed(dataset(), checkpoint(hz=0.0, control=""))
    assumed = {item.name for item in agreement.items if item.status == "assumed"}
    assert assumed == {"control mode", "control rate"} and not agreement.conflicts


def test_a_protocol_of_another_robot_names_the_point():
    items = protocol_items(ROBOT, replace(ROBOT, hz=10.0, renderer="ray"), "toy")
    assert {item.name: item.status for item in items} == {
        "evaluation rate in Hz": "conflict",
        "evaluation renderer": "differs",
    }
    assert dict(items[0].sides) == {"dataset": "30.0", "protocol": "10.0"}


# ------------------------------------------------------------------------------------------------- file


def test_an_agreement_is_kept_and_read_back(tmp_path: Path):
    agreement = agreed(dataset((True, True, True)), checkpoint(), True, actions="data", cameras={"front": ""})
    agreement.write(tmp_path)
    assert read(tmp_path) == agreement
    assert read(tmp_path / "older") is None


def _with_item(**changed: object) -> str:
    item = {"name": "rate", "sides": {"dataset": "10"}, "value": "10", "status": "same"} | changed
    return json.dumps({"format": 1, "items": [item], "cameras": [], "relative": []})


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "{}", '{"format": 2}', '{"format": 1, "items": [{"a": 1}]}', _with_item(sides=[]),
        _with_item(sides={"dataset": 3}), _with_item(value=3), _with_item(name=None), _with_item(status=[]),
        _with_item(accept=[1]), _with_item(accept=1), _with_item(short=3),
    ],
)  # fmt: skip
def test_a_damaged_agreement_is_one_error_with_its_path(content: str, tmp_path: Path):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ConfigError, match=FILE):
        read(tmp_path)


# ------------------------------------------------------------------------------------- accepting all of it


def test_another_robot_is_accepted_by_the_options_at_the_end_of_the_error():
    own = dataset(
        cameras=cameras("head", size=(10, 20)),
        state=Feature("state", (5,)),
        action=Feature("action", (3,), "rad", ("a", "b", "c")),
        hz=50.0,
    )
    other = replace(checkpoint(slots=("front",), cameras=cameras("front")), room=(4, 4))
    with pytest.raises(EmbodimentError) as error:
        agreed(own, other).require()
    assert str(error.value).splitlines()[-1].strip().split(" --") == [
        "--adapt.cameras.front CAMERA", "adapt.resize true", "adapt.robot true", "data.statistics data",
        "policy.config.state_dim 5", "policy.resize fresh",
    ]  # fmt: skip
    accepted = agreed(own, other, True, robot=True, resize=True, cameras={"front": "head"})
    accepted.require()


def test_no_options_are_named_where_one_difference_needs_a_choice():
    own, other = dataset((True, True, False), hz=50.0), checkpoint(())
    with pytest.raises(EmbodimentError) as error:
        agreed(own, other).require()
    assert "If all of this is meant" not in str(error.value)


def test_a_checkpoints_unit_and_control_mode_do_not_hold_for_another_robot_that_states_none():
    plain = Feature("action", (3,), "", ROBOT.action.labels)
    own, other = dataset(control="", action=plain), checkpoint(hz=80.0)
    by_name = {item.name: item for item in agreed(own, other, True, robot=True).items}
    assert by_name["action unit"].value == by_name["control mode"].value == "not stated"
    assumed = {item.name: item for item in agreed(own, other).items}
    assert assumed["action unit"].value == "rad" and assumed["action unit"].status == "assumed"


# ----------------------------------------------------------------------------------------- on a console


def humanoid(prefix: str = "joint") -> Feature:
    return Feature("state", (26,), "", tuple(f"{prefix}{i}" for i in range(26)))


def test_a_console_shows_long_lists_short_and_one_row_for_state_and_action():
    joints = humanoid()
    agreement = agreed(dataset(state=joints, action=joints), checkpoint(), fresh=True, robot=True)
    rows = {row[0]: row for row in agreement.rows(short=True)}
    names = rows["state and action names"]
    assert names[1] == names[3] == "joint0, joint1, ... joint25 (26 names)"
    assert names[2] == "shoulder, elbow, gripper"
    assert rows["state and action dimensions"][1:4] == ("26", "3", "26")
    assert not {"state names", "action names", "state dimensions"} & set(rows)
    whole = {row[0]: row for row in agreement.rows()}
    assert whole["state names"][1] == whole["action names"][1] == ", ".join(joints.labels)
    assert len(agreement_table(agreement).splitlines()) == 1 + len(rows)


def test_names_that_differ_in_part_are_shown_whole_because_each_may_matter():
    joints, other = humanoid(), list(humanoid().labels)
    other[13] = "thumb"
    agreement = agreed(
        dataset(state=joints), checkpoint(state=replace(joints, labels=tuple(other))), fresh=False
    )
    assert "joint13" in str(agreement.rows(short=True)) and "thumb" in str(agreement.rows(short=True))
    with pytest.raises(EmbodimentError, match="joint12, joint13, joint14.*joint12, thumb, joint14"):
        agreement.require()


def test_state_and_action_that_differ_keep_their_rows():
    agreement = agreed(dataset(), checkpoint(state=replace(ROBOT.state, unit="deg")), fresh=True, robot=True)
    assert {"state unit", "action unit"} <= {row[0] for row in agreement.rows(short=True)}


def test_what_a_console_shortens_is_whole_in_the_file(tmp_path: Path):
    joints = humanoid()
    agreement = agreed(dataset(state=joints, action=joints), checkpoint(), fresh=True, robot=True)
    agreement.write(tmp_path)
    assert "short" not in (tmp_path / FILE).read_text()
    kept = read(tmp_path)
    assert kept is not None and kept.rows() == agreement.rows()


def test_two_humanoids_differ_in_short_lines_that_show_where():
    def robot(*changes: tuple[int, str]) -> Embodiment:
        labels = list(humanoid().labels)
        for i, name in changes:
            labels[i] = name
        return replace(ROBOT, state=replace(humanoid(), labels=tuple(labels)))

    sawyer = replace(ROBOT, state=Feature("state", (2,), "", ("x", "y")))
    assert differences(robot(), sawyer)[1:] == [
        "state labels: joint0, joint1, ... joint25 (26 names) here, x, y there"
    ]
    assert differences(robot(), robot((3, "elbow"), (9, "wrist"))) == [
        "state labels: joint3 (number 4), joint9 (number 10) here, elbow (number 4), wrist (number 10) there"
    ]
    (many,) = differences(robot(), robot(*((i, f"a{i}") for i in range(12))))
    assert many.count("and 4 more") == 2 and len(many) < 400


def test_the_options_that_accept_another_robot_are_those_of_the_page():
    """Options of one section stand together, in the order in which docs/your_robot.md shows them."""
    g1 = dataset(
        cameras=cameras("cam_high", size=(10, 20)), state=humanoid(), action=humanoid(), control="", hz=30.0
    )
    small = replace(checkpoint(slots=("workspace",), cameras=cameras("workspace")), room=(4, 4))
    with pytest.raises(EmbodimentError) as error:
        agreed(g1, small).require()
    lines = [line.lstrip("# ") for line in PAGE.read_text(encoding="utf-8").splitlines()]
    begin = next(i for i, line in enumerate(lines) if line.startswith("--adapt.cameras.workspace CAMERA"))
    assert " ".join(lines[begin : begin + 2]) == str(error.value).splitlines()[-1].strip()


@pytest.mark.parametrize("name", ["top", "left wrist", 'the "left" one', "a\\b"])
def test_what_a_message_gives_for_a_recipe_is_toml_that_names_the_same_cameras(name: str) -> None:
    assert tomllib.loads(f"cameras = {table({name: name, 'top2': ''})}")["cameras"] == {
        name: name,
        "top2": "",
    }
    assert tomllib.loads(to_themselves([name])[0].partition("] ")[2])["cameras"] == {name: name}
