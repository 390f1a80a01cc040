"""Public checkpoints fine-tuned on LIBERO, under a protocol: what the policy sees, and what the robot gets.

The checkpoints are tiny ones in the same layouts, the environment has LIBERO's robot without its simulator,
and what is expected is computed here as LeRobot, openpi and OpenVLA-OFT do, in numpy, PIL and torch.
"""

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.checkpoints import libero_folders as folders
from tests.checkpoints.libero_folders import ACTION, STATE
from tests.rollout.libero_like import SENTENCE, START, LiberoLike, after, picture
from vlafit import checkpoints, rollout
from vlafit.actor import load_actor
from vlafit.agreement import Agreement
from vlafit.agreement.camera_map import camera_options
from vlafit.checkpoints.export import export
from vlafit.checkpoints.formats.lerobot.write_processors import codec_refusals
from vlafit.checkpoints.formats.openpi.norm_stats import FAST_CAMERAS
from vlafit.cli import main
from vlafit.codec import Codec
from vlafit.envs import EnvSpec
from vlafit.errors import ConfigError, EmbodimentError, WeightsError
from vlafit.execution import Execution
from vlafit.rollout import Protocol
from vlafit.rollout.reach import require_reach
from vlafit.serve.describe import describe
from vlafit.types import Feature

HORIZON = 20
OFT = {"chunk": 8, "vision.dino.heads": 2, "vision.siglip.heads": 2}
OFT_CAMERAS = {"openvla.cameras": ["agentview", "wrist"]}
LEROBOT = {"image": "agentview", "image2": "wrist"}
OPENPI = {"base_0_rgb": "agentview", "left_wrist_0_rgb": "wrist", "right_wrist_0_rgb": ""}
A = {name: np.array(values) for name, values in ACTION.items()}
S = {name: np.array(values) for name, values in STATE.items()}


def protocol(size: int, replan: int) -> Protocol:
    return Protocol(
        name="libero-like",
        env=EnvSpec("tests.rollout.libero_like", size=size),
        tasks=("soup",),
        trials=1,
        first_seed=0,
        horizon=HORIZON,
        replan=replan,
    )


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of each kind, and PaliGemma's stand-in tokenizer."""
    root = tmp_path_factory.mktemp("public")
    folders.write_tokenizer(root / "paligemma")
    folders.write_lerobot_pi05(root / "pi05_libero_finetuned", empty=1)
    folders.write_lerobot_smolvla(root / "smolvla_libero")
    folders.write_openpi(root / "pi05_libero", "pi05")
    folders.write_openpi(root / "pi0_libero", "pi0", padded=True)
    folders.write_openpi_orbax(root / "pi0_libero_jax")
    folders.write_oft(root / "oft", tokenizer=root / "paligemma")
    return root


@dataclass(frozen=True)
class Case:
    """How one of them is loaded, and what its own program makes of an observation and an answer."""

    name: str
    size: int
    replan: int
    load: dict[str, Any]
    fit: Callable[[np.ndarray, int], np.ndarray]
    prompt: Callable[[np.ndarray], str]
    state: Callable[[np.ndarray], np.ndarray] | None
    actions: Callable[[np.ndarray, np.ndarray], np.ndarray]
    grey: float = 0.51
    """Most levels of 255 that a pixel may be away, of the rounding to whole ones."""


def _interpolated(image: np.ndarray, size: int) -> np.ndarray:
    """LeRobot's resize_with_pad: floats, bilinear, not antialiased; squares need no padding."""
    x = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()
    made = torch.nn.functional.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
    return made[0].permute(1, 2, 0).numpy()


def _pil(image: np.ndarray, size: int) -> np.ndarray:
    """openpi_client.image_tools.resize_with_pad, of a square."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR), np.float64)


def _cropped(image: np.ndarray, size: int) -> np.ndarray:
    """About what OFT does: Lanczos, and the middle 0.9 of the area."""
    small = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS))
    edge = size * (1 - 0.9**0.5) / 2
    middle = Image.fromarray(small).resize(
        (size, size), Image.Resampling.BILINEAR, box=(edge, edge, size - edge, size - edge)
    )
    return np.asarray(middle, np.float64)


def _bins(state: np.ndarray, padded: int = 8) -> str:
    """The prompt of LeRobot's pi0.5; LeRobot 0.4 padded the state before (pad_vector)."""
    normal = np.pad(2 * (state - S["q01"]) / (S["q99"] - S["q01"]) - 1, (0, padded - 8))
    bins = np.digitize(normal, np.linspace(-1, 1, 257)[:-1]) - 1
    return f"Task: {SENTENCE}, State: {' '.join(map(str, bins))};\nAction: "


def _quantiles_back(answer: np.ndarray, _: np.ndarray) -> np.ndarray:
    return (answer + 1) / 2 * (A["q99"] - A["q01"]) + A["q01"]


def _pi0_back(answer: np.ndarray, state: np.ndarray) -> np.ndarray:
    actions = answer * (A["std"] + 1e-6) + A["mean"]
    actions[:, :6] += state[:6]  # extra_delta_transform of openpi's pi0_libero
    return actions


def _oft_back(answer: np.ndarray, _: np.ndarray) -> np.ndarray:
    actions = 0.5 * (answer + 1) * (A["q99"] - A["q01"] + 1e-8) + A["q01"]
    actions[:, 6] = -np.sign(2 * answer[:, 6] - 1)  # normalize_gripper_action, invert_gripper_action
    return actions


def _pi0(name: str, config: dict[str, Any]) -> Case:
    """openpi's pi0 of LIBERO, in one of the two forms of its weights."""
    relative = {"codec.relative": [True] * 6 + [False]}
    load = {"config": {**config, **relative}, "cameras": OPENPI, "tokenizer": True}
    return Case(
        name, 256, 5, load, _pil, lambda _: f"{SENTENCE}\n",
        lambda state: (state - S["mean"]) / (S["std"] + 1e-6), _pi0_back, grey=1.01,
    )  # fmt: skip


CASES = [
    Case(
        "pi05_libero_finetuned", 360, 10,
        {"config": {"vision.heads": 2}, "cameras": LEROBOT, "tokenizer": True},
        _interpolated, _bins, None, _quantiles_back,
    ),
    Case(
        "pi05_libero_finetuned", 360, 10,
        {
            "config": {"vision.heads": 2, "lerobot.prompt_state": 32}, "cameras": LEROBOT, "tokenizer": True,
        },
        _interpolated, lambda state: _bins(state, 32), None, _quantiles_back,
    ),
    Case(
        "smolvla_libero", 360, 10, {"cameras": LEROBOT},
        _interpolated, lambda _: f"{SENTENCE}\n",
        lambda state: (state - S["mean"]) / (S["std"] + 1e-8),
        lambda answer, _: answer * (A["std"] + 1e-8) + A["mean"],
    ),
    Case(
        "pi05_libero", 256, 5,
        {"config": {"vision.heads": 2, "state_input": "none"}, "cameras": OPENPI, "tokenizer": True},
        _pil, lambda _: f"{SENTENCE}\n", None, _quantiles_back, grey=1.01,
    ),
    _pi0("pi0_libero", {"vision.heads": 2}),
    _pi0("pi0_libero_jax", {"chunk": 6}),
    Case(
        "oft", 256, 8, {"config": OFT | OFT_CAMERAS | {"openvla.gripper": [1.0, -1.0]}}, _cropped,
        lambda _: f"In: What action should the robot take to {SENTENCE}?\nOut:",
        lambda s: np.clip(2 * (s - S["q01"]) / (S["q99"] - S["q01"] + 1e-8) - 1, -1, 1), _oft_back, grey=12.0,
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{len(case.load.get('config', {}))}")
def test_the_policy_sees_and_the_robot_gets_what_the_checkpoints_own_program_makes(
    case: Case, public: Path, tmp_path: Path
):
    load = {**case.load, "frame_size": case.size}
    if load.pop("tokenizer", False):
        load["tokenizer"] = public / "paligemma"
    actor = load_actor(public / case.name, device="cpu", **load)
    asked, act = [], actor.policy.act

    def watched(batch, rng):
        answer = act(batch, rng)
        asked.append((batch, answer[0].double().numpy()))
        return answer

    actor.policy.act = watched
    result = rollout.evaluate(actor, protocol(case.size, case.replan), tmp_path / "out", workers=1, videos=0)
    assert not result.records[0].error and len(asked) == -(-HORIZON // case.replan)

    state, size = START.copy(), actor.codec.config.image_size
    for number, (batch, answer) in enumerate(asked):
        assert batch.image_mask.tolist() == [[True, True]]  # a third camera is not there at all
        seen = batch.images[0].permute(0, 2, 3, 1).double().numpy()
        for slot, camera in enumerate(("agentview", "wrist")):
            wanted = case.fit(picture(camera, number * case.replan, case.size), size)
            apart = np.abs((seen[slot] + 1) * 127.5 - wanted)
            assert apart.max() <= case.grey, (camera, apart.max())
        tokens = batch.prompt()[0][0][batch.prompt()[1][0]].tolist()
        assert tokens == _tokens(actor, case.prompt(state.astype(np.float64)))
        if case.state is not None:
            got = batch.state[0].numpy()
            np.testing.assert_allclose(got[:8], case.state(state.astype(np.float64)), rtol=0, atol=1e-5)
            assert not got[8:].any()
        actions = case.actions(answer[: case.replan, :7].copy(), state.astype(np.float64))
        for action in actions.astype(np.float32):
            state = after(state, action)  # the next call sees it, and with it what the robot was sent


def _tokens(actor, text: str) -> list[int]:
    """Return the tokens of a prompt, whatever special ones are added to it."""
    codec = actor.codec
    pieces = (text,)
    if codec.config.prompt == "pi0":
        pieces = (text.removesuffix("\n"), "\n")
    elif codec.config.prompt == "openvla":
        pieces = (f"{text} ",)
    ids, mask = codec.tokenise(pieces)
    return ids[mask].tolist()


def _options(words: str) -> list[str]:
    """Return the options that a message proposes."""
    return [w for w in shlex.split(words) if w]


def test_a_message_leads_to_the_command_that_runs(public: Path, tmp_path: Path, capsys):
    path = tmp_path / "like.toml"
    path.write_text(
        'name = "like"\npurpose = "LIBERO\'s robot."\ntasks = ["soup"]\ntrials = 1\nfirst_seed = 0\n'
        'horizon = 4\nreplan = 2\n[env]\nname = "tests.rollout.libero_like"\nsize = 360\n'
    )
    out = tmp_path / "out"
    command = ["eval", str(public / "smolvla_libero"), "--protocol", str(path), "--out", str(out)]
    command += ["--workers", "1", "--videos", "0"]
    assert main(command) == 2
    error = capsys.readouterr().err
    proposed = error[error.index("--cameras") : error.index(" of eval and serve")]
    assert proposed == "--cameras image=agentview image2=wrist --frame-size 360"
    assert main([*command, "--frame-size", "360"]) == 2  # names no camera yet
    assert "--cameras image=agentview image2=wrist of eval and serve" in capsys.readouterr().err
    assert main([*command, *_options(proposed.replace("image2=wrist", "image2=wrst"))]) == 2
    assert "--cameras: the robot has no camera 'wrst'; did you mean 'wrist'?" in capsys.readouterr().err
    assert main([*command, *_options(proposed)]) == 0
    shown = capsys.readouterr().out
    assert "agentview 360x360" in shown and "image 256x256" in shown
    assert "steps executed" in shown and "--replan 1" in shown  # the protocol's 2 hold, and it is said
    names = {item["name"] for item in json.loads((out / "result.json").read_text())["agreement"]}
    assert {"camera image", "camera image2", "steps executed"} <= names
    swapped = ["--cameras", "image=wrist", "image2=agentview", "--frame-size", "360"]
    assert main([*command, *swapped, "--resume"]) == 2  # another evaluation: it saw other pictures
    assert main([*command, *_options(proposed), "--resume"]) == 0


def test_of_openpi_s_three_cameras_the_last_is_proposed_to_be_empty(public: Path, tmp_path: Path):
    actor = load_actor(
        public / "pi05_libero", config={"vision.heads": 2}, tokenizer=public / "paligemma", device="cpu"
    )
    with pytest.raises(EmbodimentError) as raised:
        rollout.evaluate(actor, protocol(256, 5), tmp_path / "out", workers=1)
    proposed = "base_0_rgb=agentview left_wrist_0_rgb=wrist right_wrist_0_rgb= --frame-size 256"
    assert proposed in str(raised.value)
    assert {item.name for item in actor.points} == {"prompt", "relative actions"}


def test_cameras_are_proposed_as_far_as_names_tell_and_only_for_the_same_robot():
    robot = LiberoLike(EnvSpec("tests.rollout.libero_like", size=256)).embodiment
    views = tuple(Feature(name, (224, 224, 3)) for name in ("cam_a", "cam_b"))
    policy = replace(robot, name="mine", cameras=views)
    text = camera_options(policy, robot)
    assert "cam_a=CAMERA cam_b=CAMERA --frame-size 256" in text and "agentview, wrist, or nothing" in text
    scene = replace(robot, cameras=(Feature("wrist_image", (256, 256, 3)), Feature("image", (256, 256, 3))))
    assert "wrist_image=wrist image=agentview of eval" in camera_options(scene, robot)
    fast = tuple(Feature(name, (224, 224, 3)) for name in FAST_CAMERAS)  # filled in openpi's order
    text = camera_options(replace(robot, cameras=fast), robot)
    assert "base_0_rgb=agentview base_1_rgb=wrist wrist_0_rgb= --frame-size 256" in text
    assert camera_options(robot, robot) == ""
    assert camera_options(replace(policy, state=Feature("state", (7,))), robot) == ""


def test_a_gripper_of_openvla_s_data_is_refused_where_it_would_never_open(public: Path, tmp_path: Path):
    load = {"config": OFT | OFT_CAMERAS, "frame_size": 256, "device": "cpu"}
    with pytest.raises(EmbodimentError, match=r"gripper.*from 0 to 1.*openvla.gripper=\[1, -1\]"):
        rollout.evaluate(load_actor(public / "oft", **load), protocol(256, 8), tmp_path / "out", workers=1)
    refused = load_actor(public / "oft", **load)
    refused.agreement = Agreement((), (), ())  # a run's: it may have learned from this robot's data
    require_reach(refused, LiberoLike(EnvSpec("tests.rollout.libero_like", size=256)).embodiment, "here")
    for wrong, why in (([1.0], "closed and for open"), ([1.0, 1.0], "closed and for open")):
        load["config"] = OFT | OFT_CAMERAS | {"openvla.gripper": wrong}
        with pytest.raises(Exception, match=why):
            load_actor(public / "oft", **load)


def test_a_policy_of_openvla_s_gripper_is_written_back_and_acts_as_before(public: Path, tmp_path: Path):
    config = OFT | OFT_CAMERAS | {"openvla.gripper": [1.0, -1.0]}
    export(public / "oft", "openvla", tmp_path / "out", config=config)
    again = checkpoints.load(tmp_path / "out", config=OFT).codec
    own = load_actor(public / "oft", config=config, device="cpu").codec
    assert again is not None and again.config.action_form == own.config.action_form
    stated = json.loads((tmp_path / "out" / "dataset_statistics.json").read_text())
    (numbers,) = stated.values()
    assert (numbers["action"]["min"][6], numbers["action"]["max"][6]) == (0, 1)  # as OFT's program reads it


def test_steps_that_another_program_executes_are_named_where_they_differ(public: Path, tmp_path: Path):
    actor = load_actor(public / "smolvla_libero", cameras=LEROBOT, frame_size=64, device="cpu")
    assert actor.executed == 1
    for replan, said in ((2, True), (1, False)):
        result = rollout.evaluate(
            actor,
            protocol(64, 4),
            tmp_path / str(replan),
            workers=1,
            videos=0,
            execution=Execution("chunk", replan=replan),
        )
        assert any(item.name == "steps executed" for item in result.agreement) == said


def test_what_the_files_leave_open_is_in_the_table_with_how_to_say_it(public: Path):
    def points(name: str, **config: object) -> dict[str, tuple[str, str, str]]:
        actor = load_actor(
            public / name,
            config={"vision.heads": 2} | config,
            tokenizer=public / "paligemma",
            device="cpu",
        )
        return {item.name: (item.value, item.status, item.reason) for item in actor.points}

    value, status, how = points("pi05_libero_finetuned")["prompt"]
    assert "8 numbers" in value and status == "assumed" and "lerobot.prompt_state=32" in how
    assert points("pi05_libero_finetuned", **{"lerobot.prompt_state": 32})["prompt"][1] == "chosen"
    of_openpi = points("pi05_libero")
    assert of_openpi["prompt"][1] == "assumed" and "state_input=none" in of_openpi["prompt"][2]
    assert of_openpi["relative actions"][:2] == ("absolute", "assumed")
    assert points("pi05_libero", state_input="none")["prompt"][:2] == (
        "pi0, with no numbers of the state",
        "chosen",
    )
    oft = load_actor(public / "oft", config=OFT | OFT_CAMERAS, device="cpu").points
    assert [(i.name, i.status, "openvla.gripper" in i.reason) for i in oft] == [("gripper", "assumed", True)]
    relative = points("pi0_libero", **{"codec.relative": [True] * 6 + [False]})
    assert relative["relative actions"][1] == "chosen" and "prompt" not in relative


def test_a_state_in_the_prompt_that_cannot_be_padded_so_is_refused(public: Path, tmp_path: Path):
    load = {"tokenizer": public / "paligemma", "device": "cpu"}
    for name, count, said in (
        ("pi05_libero_finetuned", 4, "8 dimensions"),
        ("pi05_libero", 32, "lerobot.prompt_state"),
    ):
        with pytest.raises(Exception, match=said):
            load_actor(public / name, config={"vision.heads": 2, "lerobot.prompt_state": count}, **load)
    with pytest.raises(WeightsError, match="holds no state"):
        load_actor(public / "smolvla_libero", config={"lerobot.prompt_state": 32}, device="cpu")
    actor = load_actor(
        public / "pi05_libero_finetuned", config={"vision.heads": 2, "lerobot.prompt_state": 32}, **load
    )
    actor.codec.save(tmp_path)
    assert Codec.load(tmp_path).config.prompt_state == 32
    assert any("32 numbers" in one for one in codec_refusals(actor.codec, "pi05"))


@pytest.mark.parametrize(
    ("cameras", "said"),
    [
        ({"imag": "agentview"}, "no camera 'imag'.*'image'"),
        ({"image": "wrist", "image2": "wrist"}, "'wrist' takes two places"),
        ({"image": "", "image2": ""}, "every camera"),
        ({"image": 3}, "cameras"),
    ],
)
def test_cameras_that_cannot_be_are_refused(public: Path, cameras: dict, said: str):
    with pytest.raises(ConfigError, match=said):
        load_actor(public / "smolvla_libero", cameras=cameras, device="cpu")


def test_what_is_served_asks_for_the_robot_s_cameras(public: Path):
    actor = load_actor(
        public / "pi05_libero",
        config={"vision.heads": 2, "state_input": "none"},
        tokenizer=public / "paligemma",
        cameras={"base_0_rgb": "image", "left_wrist_0_rgb": "wrist_image", "right_wrist_0_rgb": ""},
        device="cpu",
    )
    assert describe(actor).required == ("image", "wrist_image")  # as openpi's client of LIBERO sends them


def test_the_recipe_s_word_and_the_options_exclude_each_other(public: Path, capsys):
    words = ["eval", str(public / "oft"), "--protocol", "libero-object-openpi", "--recipe", "quickstart"]
    assert main([*words, "--cameras", "a=b"]) == 2
    assert "--cameras" in capsys.readouterr().err
