"""LeRobot's checkpoints against what LeRobot itself recorded, in both layouts, whole and damaged."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import vlafit
from tests.checkpoints.forms import GROOT_CHAT
from tests.policies.tiny import random_batch, random_draws, random_policy
from vlafit import checkpoints
from vlafit.checkpoints.export import export
from vlafit.checkpoints.formats.lerobot import names as lerobot
from vlafit.checkpoints.formats.lerobot import relative_actions
from vlafit.checkpoints.formats.openpi import names as openpi
from vlafit.checkpoints.name_map import back
from vlafit.codec import Codec
from vlafit.codec.images import bilinear, fit_image
from vlafit.errors import CodecError, WeightsError
from vlafit.nn.batch import Batch
from vlafit.nn.rng import sample_rng
from vlafit.policies.smolvla import SmolVLA
from vlafit.types import Observation, Sample

FIXTURE = Path(__file__).parents[1] / "fixtures" / "lerobot_smolvla"
IO = load_file(FIXTURE / "io.safetensors")
RAW = load_file(FIXTURE / "processor_io.safetensors")
TASKS = ("pick up the_red block", "open drawer\n")
CLOSE = {"atol": 1e-4, "rtol": 0.0}
HEAD = "model.vlm_with_expert.vlm.lm_head.weight"


def recorded_batch(cameras: tuple[str, ...] = ("cam_high", "cam_wrist")) -> Batch:
    """The recorded model-ready inputs; the loss looks at the robot's six action dimensions alone."""
    mask = torch.zeros(2, 10, 32, dtype=torch.bool)
    mask[..., :6] = True
    return Batch(
        images=torch.stack([IO[f"core.image.{name}"] for name in cameras], 1),
        image_mask=torch.ones(2, len(cameras), dtype=torch.bool),
        tokens=IO["raw.observation.language.tokens"],
        token_mask=IO["raw.observation.language.attention_mask"],
        state=IO["core.state_padded"],
        actions=IO["core.actions_padded"],
        action_mask=mask,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(FIXTURE, tmp_path / "copy")
    return tmp_path / "copy"


def edit(path: Path, change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


# ------------------------------------------------------------------------------------------------ parity


@pytest.mark.parity
def test_velocity_and_losses_equal_the_recorded_ones():
    policy = vlafit.load_policy(FIXTURE)
    batch = recorded_batch()
    velocity = policy.velocity(batch, noise=IO["raw.noise"], time=IO["raw.time"])
    errors = (IO["raw.noise"] - IO["core.actions_padded"] - velocity).square()
    torch.testing.assert_close(errors, IO["out.losses_unreduced"], **CLOSE)
    loss = policy.flow_loss(batch, noise=IO["raw.noise"], time=IO["raw.time"])["loss"]
    torch.testing.assert_close(loss, IO["out.loss"], **CLOSE)


@pytest.mark.parity
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_samples_equal_the_recorded_ones(steps: int):
    actions = vlafit.load_policy(FIXTURE).sample(recorded_batch(), noise=IO["raw.noise"], steps=steps)
    torch.testing.assert_close(actions, IO[f"out.sample_actions.n{steps}"], **CLOSE)


@pytest.mark.parity
@pytest.mark.parametrize("slot", ["dropped", "masked"])
def test_a_missing_camera_gives_the_recorded_actions(slot: str):
    batch = recorded_batch(("cam_high",)) if slot == "dropped" else recorded_batch()
    batch.image_mask[:, 1:] = False
    actions = vlafit.load_policy(FIXTURE).sample(batch, noise=IO["raw.noise"])
    torch.testing.assert_close(actions[..., :6], IO["missing_wrist.predict_action_chunk"], **CLOSE)


@pytest.mark.parity
def test_a_padded_chunk_has_the_recorded_loss():
    batch = recorded_batch()
    assert batch.action_mask is not None
    batch.action_mask &= ~IO["raw.action_is_pad"][:, :, None]
    loss = vlafit.load_policy(FIXTURE).flow_loss(batch, noise=IO["raw.noise"], time=IO["raw.time"])["loss"]
    torch.testing.assert_close(loss, IO["padded.loss"], **CLOSE)


@pytest.mark.parity
def test_gradients_have_the_recorded_norms_and_the_frozen_backbone_has_none():
    policy = vlafit.load_policy(FIXTURE)
    norms = json.loads((FIXTURE / "gradient_norms.json").read_text())["grad_norms"]
    trained = {i.name for i in policy.parts() if i.part in ("expert", "projections")}
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(name in trained)
    policy.flow_loss(recorded_batch(), noise=IO["raw.noise"], time=IO["raw.time"])["loss"].backward()
    assert {lerobot.SMOLVLA.file_name(name) for name in trained} == set(norms)
    for name, parameter in policy.named_parameters():
        theirs = lerobot.SMOLVLA.file_name(name)
        assert (parameter.grad is None) == (theirs not in norms)
        if parameter.grad is not None:
            assert float(parameter.grad.norm()) == pytest.approx(norms[theirs], rel=1e-3)
            if f"grad.{theirs}" in IO:
                torch.testing.assert_close(parameter.grad, IO[f"grad.{theirs}"], **CLOSE)


# ------------------------------------------------------------------------------------------------- codec


def robot_view(i: int, source: dict[str, torch.Tensor], instruction: str = "go") -> Observation:
    """Row `i` of recorded inputs as a robot gives it; its images become whole grey levels."""
    images = {
        name: (source[f"raw.observation.images.{name}"][i] * 255).round().byte().permute(1, 2, 0).numpy()
        for name in ("cam_high", "cam_wrist")
    }
    return Observation(images, source["raw.observation.state"][i].numpy(), instruction)


@pytest.fixture(scope="module")
def codec() -> Codec:
    loaded = vlafit.load_checkpoint(FIXTURE)
    assert loaded.codec is not None and loaded.report.codec == ""
    return loaded.codec


@pytest.mark.parity
def test_the_codec_encodes_what_the_processors_recorded(codec: Codec):
    for i, task in enumerate(TASKS):
        sample = Sample(
            robot_view(i, RAW, task), RAW["raw.action"][i].numpy(), np.ones(10, bool), ("", "", i)
        )
        encoded = codec.encode(sample)
        length = RAW["pre.observation.language.tokens"].shape[1]
        assert np.array_equal(encoded.tokens[:length], RAW["pre.observation.language.tokens"][i])
        assert np.array_equal(encoded.token_mask[:length], RAW["pre.observation.language.attention_mask"][i])
        assert not encoded.token_mask[length:].any()
        np.testing.assert_allclose(encoded.state[:7], RAW["pre.observation.state"][i], atol=1e-5)
        assert encoded.actions is not None
        np.testing.assert_allclose(encoded.actions[:, :6], RAW["pre.action"][i], atol=1e-5)


@pytest.mark.parity
def test_the_codec_decodes_to_the_recorded_actions(codec: Codec):
    given, wanted = RAW["post_in.action"].numpy(), RAW["post_out.action"].numpy()  # [2, 6]
    actions = np.zeros((codec.config.chunk, codec.config.action_dim), dtype=np.float32)
    actions[: len(given), :6] = given
    got = codec.decode(actions, robot_view(0, RAW)).actions
    np.testing.assert_allclose(got[: len(given)], wanted, atol=1e-5)


@pytest.mark.parity
def test_images_lie_where_the_reference_puts_them(codec: Codec):
    for i in range(2):
        images = codec.encode(robot_view(i, IO)).images
        for slot, name in enumerate(("cam_high", "cam_wrist")):
            got = images[slot].astype(np.float32) / 255 * 2 - 1
            # Half a grey level is lost on the way in, and half on the way out.
            np.testing.assert_allclose(got, IO[f"core.image.{name}"][i], atol=1.01 * 2 / 255)


@pytest.mark.parity
def test_bilinear_interpolation_is_the_references():
    image = IO["raw.observation.images.cam_high"][0].permute(1, 2, 0).numpy()
    want = IO["core.image.cam_high"][0].permute(1, 2, 0).numpy()[29:]
    np.testing.assert_allclose(bilinear(image, 35, 64) * 2 - 1, want, atol=1e-5)
    for height, width in ((40, 72), (64, 64), (7, 90), (1, 1)):
        ours = bilinear(image, height, width)
        theirs = torch.nn.functional.interpolate(
            torch.from_numpy(image).permute(2, 0, 1)[None], size=(height, width), mode="bilinear"
        )
        np.testing.assert_allclose(ours, theirs[0].permute(1, 2, 0).numpy(), atol=1e-5)


def test_padding_is_black_and_centred_or_top_left():
    white = np.full((10, 20, 3), 255, np.uint8)
    assert (fit_image(white, 20, "smolvla")[:10] == 0).all()
    assert (fit_image(white, 20, "smolvla")[10:] == 255).all()
    for framing in ("openpi", "lerobot"):
        assert (fit_image(white, 20, framing)[5:15] == 255).all()
    assert fit_image(fit_image(white, 20, "smolvla"), 20, "smolvla").shape == (20, 20, 3)


def test_the_robot_has_the_features_names_and_nothing_invented(codec: Codec):
    robot = codec.embodiment
    assert [(c.name, c.shape) for c in robot.cameras] == [
        ("cam_high", (40, 72, 3)),
        ("cam_wrist", (40, 72, 3)),
    ]
    assert (robot.state.shape, robot.action.shape) == ((7,), (6,))
    assert (robot.hz, robot.control) == (0.0, "")


def test_a_native_checkpoint_keeps_such_a_codec_exactly(codec: Codec, tmp_path: Path):
    policy = vlafit.load_policy(FIXTURE)
    vlafit.save_checkpoint(policy, tmp_path / "native", codec)
    again = vlafit.load_checkpoint(tmp_path / "native")
    assert again.codec is not None
    assert again.codec.config == codec.config
    one, other = codec.encode(robot_view(0, RAW)), again.codec.encode(robot_view(0, RAW))
    assert np.array_equal(one.state, other.state) and np.array_equal(one.tokens, other.tokens)


def test_a_missing_tokenizer_is_reported_and_may_be_given(folder: Path):
    shutil.move(folder / "tokenizer", folder.parent / "elsewhere")
    edit(folder / "policy_preprocessor.json", lambda v: v["steps"][3].pop("artifacts"))
    loaded = vlafit.load_checkpoint(folder)
    assert loaded.codec is None
    assert "tokenizer 'tokenizer' is not in the folder; give its folder" in loaded.report.text()
    assert vlafit.load_checkpoint(folder, tokenizer=folder.parent / "elsewhere").codec is not None


def test_an_empty_camera_is_a_slot_that_is_always_missing(folder: Path):
    key = "observation.images.empty_camera_0"
    edit(
        folder / "config.json",
        lambda v: v["input_features"].update({key: {"type": "VISUAL", "shape": [3, 480, 640]}}),
    )
    codec = vlafit.load_checkpoint(folder).codec
    assert codec is not None and codec.config.cameras == ("cam_high", "cam_wrist", "")
    assert codec.encode(robot_view(0, RAW)).image_mask.tolist() == [True, True, False]


def test_a_renamed_camera_has_the_robots_name(folder: Path):
    names = {"observation.images.front": "observation.images.cam_high"}
    edit(folder / "policy_preprocessor.json", lambda v: v["steps"][0]["config"].update(rename_map=names))
    codec = vlafit.load_checkpoint(folder).codec
    assert codec is not None and codec.config.cameras == ("front", "cam_wrist")


@pytest.mark.parametrize(
    ("exclude", "names", "mask"),
    [
        (["gripper"], ["x", "y", "left_Gripper.pos"], (True, True, False)),
        ([], ["x", "y", "gripper"], (True, True, True)),
        (["gripper"], None, (True, True, True)),
    ],
)
def test_relative_dimensions_are_told_by_the_names_of_joints(exclude, names, mask):
    assert relative_actions.mask_of(names, exclude, 3) == mask


JOINTS = ["grip", "j4", "j3", "j2", "j1", "j0"]


def make_relative(folder: Path, **config: Any) -> None:
    steps = (
        ("pre", 5, {"registry_name": "relative_actions_processor", "config": {"enabled": True} | config}),
        ("post", 1, {"registry_name": "absolute_actions_processor", "config": {"enabled": True}}),
    )
    for name, place, step in steps:
        edit(
            folder / f"policy_{name}processor.json",
            lambda v, place=place, step=step: v["steps"].insert(place, step),
        )


def test_the_names_by_which_a_processor_finds_its_mask_are_those_of_the_action(folder: Path):
    make_relative(folder, action_names=JOINTS, exclude_joints=["grip"])
    declared = checkpoints.declaration(folder)
    assert declared.embodiment is not None
    assert declared.embodiment.action.labels == tuple(JOINTS)
    assert declared.relative == (False, True, True, True, True, True)
    codec = vlafit.load_checkpoint(folder).codec
    assert codec is not None and codec.embodiment.action.labels == tuple(JOINTS)


@pytest.mark.case(
    section="checkpoints",
    report="config.json and the processors say different things about relative actions",
    user_has="a LeRobot checkpoint whose config.json or processors were edited or copied",
    now="refused, naming both files and both settings",
)
@pytest.mark.parametrize(
    ("config", "step"),
    [
        ({"use_relative_actions": True}, None),
        ({"use_delta_joint_actions": True}, None),
        ({"use_relative_actions": False}, {}),
        (
            {"use_relative_actions": True, "relative_exclude_joints": []},
            {"action_names": JOINTS, "exclude_joints": ["grip"]},
        ),
        ({"action_feature_names": JOINTS[::-1]}, {"action_names": JOINTS}),
    ],
)
def test_two_files_that_contradict_each_other_on_relative_actions_are_refused(
    folder: Path, config: dict[str, Any], step: dict[str, Any] | None
):
    edit(folder / "config.json", lambda v: v.update(config))
    if step is not None:
        make_relative(folder, **step)
    for look in (vlafit.load_checkpoint, checkpoints.declaration):
        with pytest.raises(WeightsError) as error:
            look(folder)
        text = str(error.value)
        assert "config.json" in text and next(iter(config)) in text and "policy_preprocessor.json" in text
        assert "contradict" in text


ORDERS = {  # a pipeline, two steps of it that change places, and what the error says of the result
    "tokens before the newline": ("pre", "smolvla_new_line_processor", "tokenizer_processor", "the line's"),
    "normalised before relative": (
        "pre", "relative_actions_processor", "normalizer_processor", "a normalised state"
    ),
    "absolute before unnormalised": (
        "post", "unnormalizer_processor", "absolute_actions_processor", "still normalised"
    ),
    "renamed after relative": (
        "pre", "rename_observations_processor", "relative_actions_processor", "renamed"
    ),
}  # fmt: skip


@pytest.mark.case(
    section="checkpoints",
    report="actions are offset, or the prompt has other tokens than in training",
    user_has="a LeRobot checkpoint whose processors run in another order than LeRobot writes them",
    now="refused, naming the file and both steps",
)
@pytest.mark.parametrize("name", ORDERS)
def test_steps_in_an_order_that_the_codec_does_not_compute_are_refused(folder: Path, name: str):
    where, first, second, effect = ORDERS[name]
    make_relative(folder)
    names = {"observation.images.front": "observation.images.cam_high"}
    edit(folder / "policy_preprocessor.json", lambda v: v["steps"][0]["config"].update(rename_map=names))
    assert vlafit.load_checkpoint(folder).codec is not None

    def exchange(pipeline: dict[str, Any]) -> None:
        steps = [step["registry_name"] for step in pipeline["steps"]]
        pipeline["steps"].insert(steps.index(second), pipeline["steps"].pop(steps.index(first)))

    edit(folder / f"policy_{where}processor.json", exchange)
    for look in (vlafit.load_checkpoint, checkpoints.declaration):
        with pytest.raises(WeightsError) as error:
            look(folder)
        for fact in (f"policy_{where}processor.json: step", first, second, effect):
            assert fact in str(error.value)


def test_steps_that_change_nothing_may_stand_anywhere(folder: Path):
    edit(folder / "policy_preprocessor.json", lambda v: v["steps"].append(v["steps"].pop(0)))
    edit(folder / "policy_postprocessor.json", lambda v: v["steps"].reverse())
    step = {"registry_name": "relative_actions_processor", "config": {"enabled": False}}
    edit(folder / "policy_preprocessor.json", lambda v: v["steps"].append(step))
    assert vlafit.load_checkpoint(folder).codec is not None


def test_relative_actions_have_another_name_in_lerobot_0_5_1(folder: Path):
    make_relative(folder, action_names=JOINTS, exclude_joints=["grip"])
    edit(
        folder / "policy_preprocessor.json",
        lambda v: v["steps"][5].update(registry_name="delta_actions_processor"),
    )
    codec = vlafit.load_checkpoint(folder).codec
    assert codec is not None and codec.config.relative == (False, True, True, True, True, True)


def test_an_unknown_step_is_named_before_the_step_that_misses_its_effect(folder: Path):
    make_relative(folder)
    edit(
        folder / "policy_preprocessor.json",
        lambda v: v["steps"][5].update(registry_name="change_actions_processor"),
    )
    for look in (vlafit.load_checkpoint, checkpoints.declaration):
        with pytest.raises(WeightsError, match=r"step 5 .change_actions_processor.: this step is not known"):
            look(folder)


def test_two_files_that_agree_on_relative_actions_load(folder: Path):
    edit(folder / "config.json", lambda v: v.update(use_relative_actions=True, action_feature_names=JOINTS))
    make_relative(folder, action_names=JOINTS, exclude_joints=["grip"])
    codec = vlafit.load_checkpoint(folder).codec
    assert codec is not None and codec.config.relative == (False, True, True, True, True, True)


@pytest.mark.parametrize(
    ("names", "exclude", "named"),
    [
        (None, ["grip"], "grip"),  # LeRobot finds joints by name, and there are none: all are relative
        (JOINTS, ["claw"], "claw"),
        (JOINTS, ["grip", "claw"], "claw"),
        (JOINTS, ["GRIP"], ""),
        (JOINTS, [], ""),
    ],
)
def test_joints_that_are_to_stay_absolute_and_do_not_are_named(folder: Path, names, exclude, named: str):
    make_relative(folder, exclude_joints=exclude, **({"action_names": names} if names else {}))
    lost = checkpoints.declaration(folder).overruled
    assert [one.stated.rpartition(" ")[2] for one in lost] == ([named] if named else [])
    for one in lost:
        assert "policy_preprocessor.json" in one.stated and one.used == "no effect"
        assert (", ".join(JOINTS) if names else "have no names") in one.reason


FEATURES: dict[str, tuple[Any, tuple[str, ...]]] = {
    # an edit of the features of a step, and what the error names of both files
    "another state": (
        lambda f: f["observation.state"].update(shape=[5]), ("observation.state has shape [7]", "[5]")
    ),
    "another action": (lambda f: f["action"].update(shape=[5]), ("action has shape [6]", "[5]")),
    "other frames": (
        lambda f: f["observation.images.cam_high"].update(shape=[3, 64, 64]), ("cam_high", "[3, 64, 64]")
    ),
    "another camera": (
        lambda f: f.update({"observation.images.left_wrist": f.pop("observation.images.cam_wrist")}),
        ("observation.images.cam_wrist", "observation.images.left_wrist"),
    ),
    "a state that is not normalised": (lambda f: f.pop("observation.state"), ("observation.state", "lacks")),
    "a camera more": (
        lambda f: f.update({"observation.images.top": {"type": "VISUAL", "shape": [3, 9, 9]}}),
        ("observation.images.top", "has no feature"),
    ),
}  # fmt: skip


@pytest.mark.case(
    section="checkpoints",
    report="config.json and the processors describe different cameras, states or actions",
    user_has="a LeRobot checkpoint put together from two",
    now="refused, naming both files and both values",
)
@pytest.mark.parametrize("name", FEATURES)
def test_features_that_config_json_and_the_processors_describe_differently_are_refused(
    folder: Path, name: str
):
    change, words = FEATURES[name]
    edit(
        folder / "policy_preprocessor.json",
        lambda v: [change(s["config"]["features"]) for s in v["steps"] if "features" in s["config"]],
    )
    for look in (vlafit.load_checkpoint, checkpoints.declaration):
        with pytest.raises(WeightsError) as error:
            look(folder)
        for word in ("config.json", "policy_preprocessor.json: step 5", "contradict", *words):
            assert word in str(error.value)


def test_features_of_processors_without_statistics_are_named_and_not_used(folder: Path):
    edit(
        folder / "policy_preprocessor.json",
        lambda v: v["steps"][5]["config"]["features"]["observation.state"].update(shape=[5]),
    )
    for name in ("pre", "post"):
        edit(
            folder / f"policy_{name}processor.json",
            lambda v: [step.pop("state_file", None) for step in v["steps"]],
        )
    (one,) = checkpoints.declaration(folder).overruled
    assert one.name == "features" and "[5]" in one.stated and "shape [7]" in one.used
    assert vlafit.load_checkpoint(folder).codec is None


def test_a_camera_that_is_always_empty_need_not_be_among_the_processors_features(folder: Path):
    empty = {"observation.images.empty_camera_0": {"type": "VISUAL", "shape": [3, 480, 640]}}
    edit(folder / "config.json", lambda v: v["input_features"].update(empty))
    assert checkpoints.declaration(folder).slots == ("cam_high", "cam_wrist", "")


def test_a_camera_that_is_always_empty_may_have_another_size_in_the_processors(folder: Path):
    """As LeRobot 0.6.1 saves what it loaded: config.json gets its own size, the processors keep theirs."""
    for file, size in (("config.json", [3, 480, 640]), ("policy_preprocessor.json", [3, 16, 16])):
        empty = {"observation.images.empty_camera_0": {"type": "VISUAL", "shape": size}}

        def add(values: dict, empty: dict = empty, config: bool = file == "config.json") -> None:
            table = values["input_features"] if config else values["steps"][5]["config"]["features"]
            table.update(empty)

        edit(folder / file, add)
    assert vlafit.load_checkpoint(folder).codec is not None
    assert checkpoints.declaration(folder).slots == ("cam_high", "cam_wrist", "")


@pytest.mark.parametrize(("kind", "mode"), [("STATE", "MEAN"), ("STAT", "MEAN_STD"), ("ACTION", "none")])
def test_a_normalisation_that_lerobot_does_not_know_is_refused_naming_it(folder: Path, kind: str, mode: str):
    edit(folder / "config.json", lambda v: v["normalization_mapping"].update({kind: mode}))
    for look in (checkpoints.inspect, checkpoints.declaration):
        with pytest.raises(WeightsError, match=f"config.json: normalization_mapping: {kind} is '{mode}'"):
            look(folder)


def test_a_normalisation_of_config_json_that_the_processors_do_not_follow_is_named(folder: Path):
    assert checkpoints.declaration(folder).overruled == ()
    edit(folder / "config.json", lambda v: v["normalization_mapping"].update(STATE="MIN_MAX"))
    (one,) = checkpoints.declaration(folder).overruled
    assert one.name == "state normalisation" and "MIN_MAX" in one.stated and "MEAN_STD" in one.used


BAD_PROCESSORS = {
    "an unknown step": (
        "policy_preprocessor.json",
        lambda v: v["steps"].insert(2, {"registry_name": "image_crop_resize_processor", "config": {}}),
        "step 2 .image_crop_resize_processor.: this step is not known",
    ),
    "normalised images": (
        "policy_preprocessor.json",
        lambda v: v["steps"][5]["config"]["norm_map"].update(VISUAL="MEAN_STD"),
        "images are normalised .MEAN_STD.",
    ),
    "deciles": (
        "policy_preprocessor.json",
        lambda v: v["steps"][5]["config"]["norm_map"].update(STATE="QUANTILE10"),
        "STATE is normalised by QUANTILE10.*data.statistics",
    ),
    "another epsilon": (
        "policy_preprocessor.json",
        lambda v: v["steps"][5]["config"].update(eps=1e-3),
        "eps is 0.001",
    ),
    "padding on the left": (
        "policy_preprocessor.json",
        lambda v: v["steps"][3]["config"].update(padding_side="left"),
        "padding_side is 'left', which is not supported",
    ),
    "another prompt length": (
        "policy_preprocessor.json",
        lambda v: v["steps"][3]["config"].update(max_length=32),
        "max_length is 32, and tokenizer_max_length is 48",
    ),
    "no truncation": (
        "policy_preprocessor.json",
        lambda v: v["steps"][3]["config"].update(truncation=False),
        "truncation is False",
    ),
    "another padding": (
        "policy_preprocessor.json",
        lambda v: v["steps"][3]["config"].update(padding="do_not_pad"),
        "padding is 'do_not_pad'",
    ),
    "half precision": (
        "policy_preprocessor.json",
        lambda v: v["steps"][4]["config"].update(float_dtype="float16"),
        "float_dtype is 'float16'",
    ),
    "a setting of the future": (
        "policy_preprocessor.json",
        lambda v: v["steps"][5]["config"].update(clip=3.0),
        "clip is 3.0; it is not known here",
    ),
    "a state that stays as it is": (
        "policy_preprocessor.json",
        lambda v: v["steps"][5]["config"].update(normalize_observation_keys=["observation.images.cam_high"]),
        "normalize_observation_keys is",
    ),
    "a part of the future": (
        "policy_preprocessor.json",
        lambda v: v["steps"][5].update(version=2),
        "'version' is not known here",
    ),
    "the environment's state": (
        "config.json",
        lambda v: v["input_features"].update(
            {"observation.environment_state": {"type": "ENV", "shape": [3]}}
        ),
        "observation.environment_state is of type 'ENV', which no policy here takes",
    ),
    "the environment's state, normalised": (
        "policy_preprocessor.json",
        lambda v: v["steps"][5]["config"]["features"].update(env={"type": "ENV", "shape": [3]}),
        "env is of type 'ENV', which no policy here takes",
    ),
    "aloha's relative joints": (
        "config.json",
        lambda v: v.update(use_delta_joint_actions_aloha=True),
        'use_delta_joint_actions_aloha is true.*set it to false.*data.statistics = "data"',
    ),
    "no normaliser": (
        "policy_preprocessor.json",
        lambda v: v["steps"].pop(5),
        "0 steps are normalizer_processor",
    ),
    "an output that is not undone": (
        "policy_postprocessor.json",
        lambda v: v["steps"][0]["config"]["norm_map"].update(ACTION="MIN_MAX"),
        "does not undo",
    ),
    "a robot without width": (
        "config.json",
        lambda v: v["output_features"].pop("action"),
        "no feature 'action' of one dimension",
    ),
    "aloha's joints": (
        "config.json",
        lambda v: v.update(adapt_to_pi_aloha=True),
        "adapt_to_pi_aloha is true",
    ),
    "special image tokens": (
        "config.json",
        lambda v: v.update(add_image_special_tokens=True),
        "add_image_special_tokens is true",
    ),
    "a shallow expert": ("config.json", lambda v: v.update(num_expert_layers=2), "num_expert_layers is 2"),
    "a wide image": (
        "config.json",
        lambda v: v.update(resize_imgs_with_padding=[64, 32]),
        r"resize_imgs_with_padding is \[64, 32\]",
    ),
    "another family": (
        "config.json",
        lambda v: v.update(type="pi0"),
        "type 'pi0', the tensors are those of smolvla",
    ),
    "no steps": ("config.json", lambda v: v.update(num_steps=0), "num_steps is 0"),
    "other periods": ("config.json", lambda v: v.update(max_period=8.0), "max_period is 8.0"),
}


@pytest.mark.parametrize("case", BAD_PROCESSORS)
def test_what_we_cannot_repeat_is_refused_by_name(folder: Path, case: str):
    name, change, message = BAD_PROCESSORS[case]
    edit(folder / name, change)
    with pytest.raises(WeightsError, match=message):
        vlafit.load_checkpoint(folder)


def test_statistics_that_are_not_there_are_an_error_and_not_a_feature_left_as_it_is(folder: Path):
    path = folder / "policy_preprocessor_step_5_normalizer_processor.safetensors"
    tensors = load_file(path)
    del tensors["observation.state.std"]
    save_file(tensors, path)
    with pytest.raises(WeightsError, match=r"observation\.state.*lerobot_mean_std.* std is not"):
        vlafit.load_checkpoint(folder)


def test_a_base_model_whose_statistics_are_of_its_datasets_loads_without_a_codec(folder: Path):
    for path in folder.glob("policy_*normalizer_processor.safetensors"):
        save_file({f"so100.buffer.{name}": tensor for name, tensor in load_file(path).items()}, path)
    loaded = vlafit.load_checkpoint(folder)
    assert loaded.codec is None
    for fact in ("so100 (action and observation.state)", "assets", "fine-tuning"):
        assert fact in loaded.report.codec


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1.0, "std is -1"),
        (float("nan"), "not finite"),
    ],
)
def test_statistics_by_which_nothing_can_be_divided_are_an_error(folder: Path, value: float, message: str):
    path = folder / "policy_preprocessor_step_5_normalizer_processor.safetensors"
    tensors = load_file(path)
    tensors["observation.state.std"][2] = value
    save_file(tensors, path)
    with pytest.raises(WeightsError, match=message):
        vlafit.load_checkpoint(folder)


@pytest.mark.case(
    section="checkpoints",
    report="a checkpoint cannot even be opened, because a joint never moved",
    user_has="a LeRobot checkpoint with a `std` of 0 in a dimension",
    now="it opens without a codec and says why; new statistics train it",
)
@pytest.mark.parametrize("feature", ["action", "observation.state"])
def test_a_deviation_of_0_leaves_the_checkpoint_without_a_codec(folder: Path, feature: str):
    for path in folder.glob("policy_*normalizer_processor.safetensors"):
        tensors = load_file(path)
        tensors[f"{feature}.std"][2] = 0.0
        save_file(tensors, path)
    for look in (vlafit.load_checkpoint, checkpoints.inspect):
        loaded = look(folder)
        assert loaded.codec is None
        for fact in (f"{feature}.std is 0 in dimension 2", 'data.statistics = "data"'):
            assert fact in loaded.report.codec
    assert checkpoints.declaration(folder).own_tokenizer == folder / "tokenizer"


def test_a_foreign_instruction_that_is_too_long_is_refused_and_not_cut(codec: Codec):
    with pytest.raises(CodecError, match="60 tokens.* 48"):
        codec.encode(robot_view(0, RAW, "a" * 59))


# ----------------------------------------------------------------------------------------------- weights


def test_the_head_is_knowingly_unused_and_the_rest_is_used():
    report = vlafit.load_checkpoint(FIXTURE).report
    assert (report.form, report.family, report.unused) == ("LeRobot", "smolvla", (HEAD,))
    assert report.parameters + 512 * 64 == sum(
        t.numel() for t in load_file(FIXTURE / "model.safetensors").values()
    )


def test_without_any_config_the_error_names_all_keys_to_give(folder: Path):
    for path in folder.iterdir():
        if path.name != "model.safetensors":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    given = {"vision.heads": 4, "language.head_dim": 16, "image_size": 64, "chunk": 10, "max_tokens": 48}
    with pytest.raises(WeightsError) as caught:
        vlafit.load_policy(folder)
    assert "give them: " + " ".join(f"--config {key}=N" for key in given) in str(caught.value)
    policy = vlafit.load_policy(folder, config=given)
    assert policy.config == vlafit.load_policy(FIXTURE).config


def test_names_of_compiled_modules_and_old_statistics_among_the_weights_are_understood(folder: Path):
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.replace("model.", "model._orig_mod.", 1): tensor for name, tensor in tensors.items()}
    tensors["normalize_inputs.so100_buffer_observation_state.mean"] = torch.full((7,), torch.inf)
    save_file(tensors, folder / "model.safetensors")
    loaded = vlafit.load_checkpoint(folder)
    assert "normalize_inputs.so100_buffer_observation_state.mean" in loaded.report.unused
    assert loaded.policy.config == vlafit.load_policy(FIXTURE).config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.state_proj.bias"), "missing .1.: model.state_proj.bias"),
        (lambda t: t.update({"model.extra": torch.ones(2)}), "surplus .1.: model.extra"),
        (
            lambda t: t["model.action_in_proj.weight"].fill_(torch.nan),
            "not finite .1.: model.action_in_proj.weight",
        ),
        (
            lambda t: t.pop("model.vlm_with_expert.lm_expert.layers.3.mlp.up_proj.weight"),
            r"missing .1.: model.vlm_with_expert.lm_expert.layers.3.mlp.up_proj.weight",
        ),
    ],
)
def test_damaged_weights_are_named(folder: Path, change, message: str):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=message):
        vlafit.load_policy(folder)


def test_the_public_size_has_the_published_number_of_parameters_and_tensors():
    from vlafit.policies.smolvla import SIZES, build

    config = SIZES["smolvla"]
    policy = build(config, "meta")
    count = sum(p.numel() for p in policy.parameters()) + config.language.vocab * config.language.width
    assert round(count / 1e6, 2) == 450.05
    assert len(list(policy.parameters())) + 1 == 500


@pytest.mark.case(
    section="checkpoints",
    report="fewer successes than LeRobot measures",
    user_has="a LeRobot checkpoint that executes part of a chunk (`n_action_steps` below `chunk_size`)",
    now="a note: the protocol says how many steps, or `--replan`; an export has the whole chunk",
)
@pytest.mark.parametrize(
    ("name", "config"),
    [("lerobot_smolvla", {}), ("lerobot_xvla", {"image_size": 64}), ("lerobot_groot", GROOT_CHAT)],
)
def test_a_part_of_the_chunk_that_lerobot_executes_is_a_note(tmp_path: Path, name: str, config: Any):
    copy = Path(shutil.copytree(FIXTURE.parent / name, tmp_path / name))
    notes = checkpoints.inspect(copy, config=config).report.notes
    assert not any("n_action_steps" in note for note in notes)
    chunk = json.loads((copy / "config.json").read_text())["chunk_size"]
    edit(copy / "config.json", lambda v: v.update(n_action_steps=5))
    notes = checkpoints.inspect(copy, config=config).report.notes
    (note,) = [note for note in notes if "n_action_steps" in note]
    assert f"executes 5 of the {chunk} steps" in note and "--replan 5" in note


@pytest.mark.case(
    section="checkpoints",
    report="a fine-tuned policy samples in other steps than the one it began with",
    user_has="a LeRobot checkpoint whose `num_steps` or `num_inference_steps` is not 10",
    now="the number is used, kept in checkpoints and exported",
)
def test_the_steps_of_config_json_are_sampled_kept_and_exported(folder: Path, tmp_path: Path):
    edit(folder / "config.json", lambda v: v.update(num_steps=3))
    policy, codec, _, report = vlafit.load_checkpoint(folder)
    assert policy.steps == checkpoints.inspect(folder).policy.steps == 3
    assert "in 3 steps" in report.text() and "in 3 steps" not in vlafit.load_checkpoint(FIXTURE).report.text()
    vlafit.save_checkpoint(policy, tmp_path / "native", codec)
    again = vlafit.load_checkpoint(tmp_path / "native")
    batch, keys = random_batch(policy.config), [(0, i) for i in range(3)]
    noise = sample_rng(keys, seed=0).normal(policy.config.chunk, policy.config.action_dim)
    assert isinstance(again.policy, SmolVLA)
    assert torch.equal(
        again.policy.act(batch, sample_rng(keys, seed=0)), again.policy.sample(batch, noise, 3)
    )
    export(tmp_path / "native", "lerobot", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_steps"] == 3


def test_a_checkpoint_without_a_number_of_steps_has_its_familys(tmp_path: Path):
    policy = vlafit.load_policy(FIXTURE)
    vlafit.save_checkpoint(policy, tmp_path / "native")
    assert set(json.loads((tmp_path / "native" / "policy.json").read_text())) == {
        "format",
        "family",
        "config",
    }
    assert vlafit.load_policy(tmp_path / "native").steps == 10


# ------------------------------------------------------------------------------------- pi0 and pi0.5


def write_pi0(folder: Path, size: str, layout: str):
    """Write a tiny pi0 or pi0.5 as LeRobot stores it, with the config.json it writes."""
    policy = random_policy(size)
    kind = "pi05" if policy.config.pi05 else "pi0"
    weights = {name: p.detach().clone() for name, p in policy.named_parameters()}
    dead = torch.randn(weights["language.embed_tokens.weight"].shape[0], policy.config.expert.width)
    if layout == "hub":
        tensors = back(weights, openpi.NAMES) | {openpi.NAMES.unused[0]: dead}
    else:
        tensors = {lerobot.PI0.file_name(name): tensor for name, tensor in weights.items()}
        stale = (
            weights["language.embed_tokens.weight"] + 1
        )  # LeRobot trains the embedding, and leaves the head
        tensors |= {lerobot.PI0.ties["language.embed_tokens.weight"]: stale, lerobot.PI0.unused[0]: dead}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    described = {"type": kind, "chunk_size": policy.config.chunk, "tokenizer_max_length": 12,
                 "max_state_dim": policy.config.state_dim, "input_features": {}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(described))
    return policy


@pytest.mark.parametrize("layout", ["hub", "save_pretrained"])
@pytest.mark.parametrize("size", ["pi0-tiny", "pi05-tiny"])
def test_pi0_loads_from_both_layouts(tmp_path: Path, size: str, layout: str):
    policy = write_pi0(tmp_path / "x", size, layout)
    given = {"vision.heads": 2, "language.head_dim": 8}
    loaded = vlafit.load_checkpoint(tmp_path / "x", config=given)
    assert loaded.report.form == "LeRobot"
    assert loaded.policy.config == policy.config
    assert all(torch.equal(p, loaded.policy.get_parameter(n)) for n, p in policy.named_parameters())
    assert any("gemma_expert.lm_head" in name for name in loaded.report.unused)
    assert any("paligemma.lm_head" in n for n in loaded.report.tied + loaded.report.unused)
    batch = random_batch(policy.config)
    noise, time = random_draws(policy.config)
    assert torch.equal(policy.velocity(batch, noise, time), loaded.policy.velocity(batch, noise, time))


def test_pi05_weights_beside_a_pi0_config_are_refused(tmp_path: Path):
    write_pi0(tmp_path / "x", "pi05-tiny", "save_pretrained")
    edit(tmp_path / "x" / "config.json", lambda v: v.update(type="pi0"))
    with pytest.raises(WeightsError, match="'pi0'.*tensors.*pi05"):
        vlafit.load_policy(tmp_path / "x")


@pytest.mark.case(
    section="checkpoints",
    report="training draws other times than the checkpoint was trained with",
    user_has="a LeRobot pi0 whose `time_sampling_*` were changed",
    now="refused, naming the key and the only value that is supported",
)
def test_settings_of_pi0_that_are_not_computed_are_refused_by_name(tmp_path: Path):
    write_pi0(tmp_path / "x", "pi0-tiny", "hub")
    path = tmp_path / "x" / "config.json"
    stated = json.loads(path.read_text())
    sampled = {"alpha": 1.5, "beta": 1.0}
    own = {f"time_sampling_beta_{name}": value for name, value in sampled.items()}
    own |= {"time_sampling_scale": 0.999, "time_sampling_offset": 0.001}
    own |= {"min_period": 0.004, "max_period": 4.0, "num_inference_steps": 5}
    heads = {"vision.heads": 2, "language.head_dim": 8}
    path.write_text(json.dumps(stated | own))
    assert vlafit.load_policy(tmp_path / "x", config=heads).steps == 5
    for key in own:
        path.write_text(json.dumps(stated | own | {key: 0}))
        with pytest.raises(WeightsError, match=f"config.json: {key} is 0"):
            vlafit.load_policy(tmp_path / "x", config=heads)
