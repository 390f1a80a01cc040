"""What a checkpoint learned from goes with it to other programs, and is compared with when it comes back."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import vlafit
from tests.checkpoints.test_groot_processors import LIBERO, TOKENIZER
from tests.checkpoints.test_groot_processors import folder as folder  # a fixture
from tests.checkpoints.test_groot_write import fitted
from tests.checkpoints.test_lerobot import FIXTURE
from tests.checkpoints.test_openvla import FRONT, PLAIN, write_plain
from tests.train.agreement_world import edited, recipe_of, start, write_card
from tests.train.world import PROTOCOL
from vlafit import checkpoints, cli, config, files
from vlafit.agreement import Agreement, Item, Learned, values
from vlafit.agreement.values import read
from vlafit.checkpoints import beside
from vlafit.checkpoints.export import export
from vlafit.checkpoints.formats import registry
from vlafit.checkpoints.formats.openpi import write as openpi_export
from vlafit.codec import CodecSet, train_word_tokenizer
from vlafit.errors import ConfigError, EmbodimentError, VlafitError, WeightsError
from vlafit.train import run

SIGN = "times -1 in dimension 0"
SCALED = ('"actions"], dim', '"actions"], scale = [-1.0, 1.0], dim')
GIVEN = {"vision.heads": 2, "language.head_dim": 8}
"""What no file of a pi0 says."""
TRAINED = ("lerobot", "openpi", "transformers")


def said_of_data(folder: Path) -> Mapping[str, str]:
    """Return what the agreement in a folder says of the data."""
    return Learned.of(read(folder)).said


def with_sign(card: Path, *, turned: bool = True, **changes: tuple[str, str]) -> Path:
    """The card with the sign of the training data, their frames if `turned`, and other texts."""
    made = card.with_name("other.toml")
    pairs = [SCALED, *changes.values()] + [('"obs/front"', '"obs/front"\nrotate = 180')] * turned
    made.write_text(edited(card.read_text(), *pairs))
    return made


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_card(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(card: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Runs whose card turns the sign of an action, and the frames upside down."""
    made, out = recipe_of(with_sign(card), None, {}), tmp_path_factory.mktemp("run")
    made = replace(made, policy=replace(made.policy, config={"max_tokens": 16, "state_dim": 5}))
    other = {"robot": True, "resize": True, "cameras": {"cam_high": "front", "cam_wrist": ""}}
    smolvla = recipe_of(with_sign(card), FIXTURE, other, statistics="data")
    for name, recipe in (("pi0", made), ("smolvla", smolvla)):
        run(recipe, out / name)
    return {name: out / name / "checkpoints" / "step_000001" for name in ("pi0", "smolvla")}


@pytest.fixture(scope="module")
def exported(trained: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    out = tmp_path_factory.mktemp("out")
    export(trained["smolvla"], "lerobot", out / "lerobot")
    export(trained["pi0"], "transformers", out / "transformers")
    loaded, openpi = checkpoints.load(trained["pi0"]), out / "openpi"
    assert loaded.codec is not None
    openpi.mkdir()  # as `export` does, which writes no tiny policy for openpi
    openpi_export.write(openpi, loaded.policy, loaded.codec)
    agreement = beside.of_one(read(trained["pi0"]), loaded.codec, CodecSet([loaded.codec]))
    beside.write(openpi, agreement, loaded.codec.embodiment)
    return {target: out / target for target in TRAINED}


def on(folder: Path, card: Path, trained: Mapping[str, Path], **adapt: Any) -> Agreement:
    """Return what a run on an export agrees on; of openpi's, with what its files do not say."""
    made = recipe_of(card, folder, {"outside": ("action.a",), **adapt})
    if folder.name == "openpi":
        slots = {"base_0_rgb": "front", "left_wrist_0_rgb": "", "right_wrist_0_rgb": ""}
        policy = replace(made.policy, config=GIVEN, tokenizer=str(trained["pi0"] / "tokenizer"))
        made = replace(made, policy=policy, adapt=replace(made.adapt, cameras=slots))
    agreement = start(made).agreement
    assert agreement is not None
    return agreement


@pytest.mark.case(
    section="checkpoints",
    report="one joint is mirrored after an export went to another program and came back",
    user_has="a run whose card turns a sign, exported, and trained on with a card that does not",
    now="every export has agreement.json; the other card is refused, both sides named",
)
@pytest.mark.parametrize("target", TRAINED)
def test_a_card_that_reads_other_values_than_an_export_learned_is_refused(
    target: str, card: Path, trained: Mapping[str, Path], exported: Mapping[str, Path]
):
    folder = exported[target]
    items = {item.name: item for item in on(folder, with_sign(card), trained).items}
    assert items["action conversion"].sides["checkpoint"] == SIGN
    for name in ("action conversion", "frames", "state names", "control mode", "control rate", "state unit"):
        assert items[name].status == "same" and "checkpoint" in items[name].sides, name
    with pytest.raises(EmbodimentError, match="action conversion: .*as in the files.*times -1"):
        on(folder, card, trained, frames=True)
    with pytest.raises(EmbodimentError, match="frames: "):
        on(folder, with_sign(card, turned=False), trained)
    chosen = {item.name: item for item in on(folder, card, trained, frames=True, conversion=True).items}
    assert chosen["action conversion"].status == chosen["frames"].status == "chosen"


@pytest.mark.parametrize("statistics", ["checkpoint", "data"])
def test_frames_of_a_camera_of_another_name_are_compared_with_those_of_its_slot(
    statistics: str, card: Path, trained: Mapping[str, Path], exported: Mapping[str, Path]
):
    """openpi names its slots itself; with fresh statistics no codec says which camera filled which."""
    renamed = with_sign(card, name=('name = "front"', 'name = "cam"'))
    slots = {"base_0_rgb": "cam", "left_wrist_0_rgb": "", "right_wrist_0_rgb": ""}

    def frames(card: Path) -> Item:
        made = recipe_of(card, exported["openpi"], {"cameras": slots}, statistics=statistics)
        policy = replace(made.policy, config=GIVEN, tokenizer=str(trained["pi0"] / "tokenizer"))
        agreement = start(replace(made, policy=policy)).agreement
        assert agreement is not None
        (item,) = [item for item in agreement.items if item.name == "frames"]
        return item

    assert frames(renamed).status == "same"
    upright = renamed.with_name("upright.toml")
    upright.write_text(renamed.read_text().replace("rotate = 180\n", ""))
    assert upright.read_text() != renamed.read_text()
    with pytest.raises(EmbodimentError, match="frames: dataset: as stored; checkpoint: front turned by 180"):
        frames(upright)


@pytest.mark.parametrize("whose", ["ours", "openpi"])
def test_inspect_compares_what_only_the_card_says_also_without_files_or_a_codec(
    whose: str,
    card: Path,
    trained: Mapping[str, Path],
    exported: Mapping[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
):
    folder = trained["pi0"] if whose == "ours" else exported["openpi"]
    other = with_sign(card)
    if whose == "ours":  # the card without its dataset
        other = Path(shutil.copy(other, tmp_path))
    upright = other.with_name("upright.toml")
    upright.write_text(other.read_text().replace("rotate = 180\n", "").replace("-1.0, 1.0", "1.0, 1.0"))
    words = [f"--config={key}={value}" for key, value in GIVEN.items()] * (whose == "openpi")
    assert cli.main(["inspect", str(folder), *words, "--data", str(upright)]) == 1
    said = "".join(capsys.readouterr())
    assert SIGN in said and "adapt] conversion = true" in said
    if whose == "ours":  # openpi's slots have to be mapped before frames can be compared
        assert "front turned by 180" in said and "adapt] frames = true" in said


@pytest.mark.parametrize(
    "item, old, new",
    [
        ("control rate", "hz = 10.0", "hz = 20.0"),
        ("control mode", '"joint_position"', '"delta_position"'),
        ("state names", '["a", "b"]', '["b", "a"]'),
        ("state unit", 'unit = "rad"', 'unit = "deg"'),
    ],
)
def test_rate_control_names_and_unit_are_compared_with_an_export(
    item: str, old: str, new: str, card: Path, trained: Mapping[str, Path], exported: Mapping[str, Path]
):
    with pytest.raises(EmbodimentError, match=item):
        on(exported["lerobot"], with_sign(card, changed=(old, new)), trained)


def test_a_folder_of_another_program_says_nothing_and_a_line_says_so(
    card: Path, trained: Mapping[str, Path], exported: Mapping[str, Path], copy_of: Any
):
    folder = copy_of(exported["lerobot"])
    (folder / "agreement.json").unlink()
    items = {item.name: item for item in on(folder, card, trained).items}
    item = items["action conversion"]
    assert (item.status, item.reason) == ("assumed", "the checkpoint does not say")


@pytest.fixture
def copy_of(tmp_path: Path) -> Any:
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "copy"))


def test_an_agreement_of_other_weights_or_a_damaged_one_is_refused(
    exported: Mapping[str, Path], copy_of: Any
):
    folder = copy_of(exported["lerobot"])
    path, weights = folder / "agreement.json", folder / "model.safetensors"
    assert checkpoints.load(folder).codec is not None
    whole = path.read_text()
    for broken in (
        whole[:-40],
        '{"format": 1}',
        "[]",
        '{"format": 1, "items": [], "cameras": [], "relative": []}',
    ):
        path.write_text(broken)
        for read_it in (checkpoints.load, checkpoints.inspect):
            with pytest.raises(VlafitError, match=r"agreement\.json"):
                read_it(folder)
    for changed in ({"relative": "yes"}, {"relative": [1, 0]}, {"cameras": "front"}, {"cameras": [3]}):
        path.write_text(json.dumps(json.loads(whole) | changed))
        with pytest.raises(ConfigError, match=f"not an agreement .*{next(iter(changed))}"):
            checkpoints.load(folder)
    content = json.loads(whole)
    content["embodiment"]["state"]["shape"] = [3]
    path.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match="says 3 state dimensions"):
        checkpoints.load(folder)
    content["embodiment"] = {"name": 3}
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"agreement\.json: embodiment"):
        checkpoints.load(folder)
    path.write_text(whole)
    tensors = load_file(weights)
    name = min(tensors)
    save_file({**tensors, name: tensors[name] + 1}, weights, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"changed: model\.safetensors"):
        checkpoints.load(folder)
    path.unlink()
    assert checkpoints.load(folder).codec is not None


@pytest.mark.case(
    section="checkpoints",
    report="a card that turns a sign is agreed on, although the checkpoint came with an agreement",
    user_has="a folder whose agreement.json was edited by hand: no items, or some rows deleted",
    now="no items: an error; a deleted row is assumed, and says that the file has no such row",
)
@pytest.mark.parametrize("native", [True, False])
def test_rows_that_were_deleted_are_said(
    native: bool, card: Path, trained: Mapping[str, Path], exported: Mapping[str, Path], copy_of: Any
):
    folder = copy_of(trained["smolvla"] if native else exported["lerobot"])
    path, manifest = folder / "agreement.json", folder / "manifest.json"
    content = json.loads(path.read_text())

    def rewrite(items: list[Any]) -> None:
        path.write_text(json.dumps(content | {"items": items}))
        if native:
            listed = json.loads(manifest.read_text())
            listed["files"]["agreement.json"] = files.sha256(path)
            manifest.write_text(json.dumps(listed))

    rewrite([])
    for read_it in (checkpoints.load, checkpoints.inspect, lambda folder: on(folder, card, trained)):
        with pytest.raises(ConfigError, match=r"agreement\.json.*items were deleted"):
            read_it(folder)
    kept = ("camera slot 0", "relative actions")
    rewrite([item for item in content["items"] if item["name"] in kept])
    items = {item.name: item for item in on(folder, card, trained).items}
    for name in ("frames", "state conversion", "action conversion"):
        assert items[name].status == "assumed" and "no such row" in items[name].reason


def test_an_export_of_a_checkpoint_that_is_older_than_agreements_says_so(
    trained: Mapping[str, Path], tmp_path: Path
):
    loaded = checkpoints.load(trained["pi0"])
    checkpoints.save(loaded.policy, tmp_path / "old", loaded.codec)
    export(tmp_path / "old", "transformers", tmp_path / "out")
    assert checkpoints.load(tmp_path / "out").codec is not None
    (item,) = json.loads((tmp_path / "out/agreement.json").read_text())["items"]
    assert item["status"] == "assumed" and "older than agreements" in item["reason"]


def test_openpis_folder_has_its_relative_actions_from_the_agreement_unless_they_are_given(
    trained: Mapping[str, Path], tmp_path: Path
):
    loaded = checkpoints.load(trained["pi0"])
    assert loaded.codec is not None
    mask, words = (True, False), trained["pi0"] / "tokenizer"
    codec = loaded.codec.with_changes(config=replace(loaded.codec.config, relative=mask))
    openpi_export.write(tmp_path, loaded.policy, codec)

    def relative(**given: Any) -> tuple[tuple[bool, ...], str]:
        made = checkpoints.load(tmp_path, config=GIVEN | given, tokenizer=words)
        assert made.codec is not None
        return made.codec.config.relative, made.report.text()

    found, said = relative()
    assert not any(found) and "do not tell whether actions are relative" in said
    beside.write(tmp_path, replace(read(trained["pi0"]), relative=mask), codec.embodiment)  # type: ignore[type-var]
    found, said = relative()
    assert found == mask and "as agreement.json says: relative in dimensions 0" in said
    assert "do not tell" not in said
    assert relative(**{"codec.relative": [False, True]})[0] == (False, True)


@pytest.mark.case(
    section="runs",
    report="a fine-tuned openpi run cannot be evaluated, or relative actions are executed as absolute ones",
    user_has="the folder of an openpi run, EXP/4999, and the card and recipe that describe its robot",
    now="`vlafit eval --recipe` opens it with `--data` and `--protocol`; a row says whose relative ones hold",
)
def test_a_run_of_openpi_is_evaluated_with_the_relative_actions_of_the_recipes_card(
    trained: Mapping[str, Path], exported: Mapping[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
):
    run_folder = tmp_path / "exp"
    shutil.copytree(exported["openpi"], run_folder / "4999")
    (run_folder / "4999" / "agreement.json").unlink()
    card = write_card(tmp_path / "data", relative="[true, false]", labels="[]", unit="")
    made = recipe_of(card, run_folder, {})
    slots = {"base_0_rgb": "front", "left_wrist_0_rgb": "", "right_wrist_0_rgb": ""}
    policy = replace(made.policy, config=GIVEN, tokenizer=str(trained["pi0"] / "tokenizer"))
    outside = ("state.0", "state.1", "action.0", "action.1")
    made = replace(made, policy=policy, adapt=replace(made.adapt, cameras=slots, outside=outside))
    (tmp_path / "recipe.toml").write_text(config.dump(made))
    (tmp_path / "toy.toml").write_text(PROTOCOL)

    def evaluate(*words: object) -> str:
        common = ["eval", run_folder, "--recipe", tmp_path / "recipe.toml", "--steps", 1, *words]
        assert cli.main([str(word) for word in common]) in (0, 2)
        return "".join(capsys.readouterr())

    data = ("--data", card, "--samples", 1, "--draws", 2, "--out", tmp_path / "data-out")
    said = evaluate(*data)
    (row,) = [line for line in said.splitlines() if line.startswith("relative actions")]
    assert "relative in dimensions 0" in row and "the checkpoint does not say" in row and "report:" in said
    other = card.with_name("other.toml")
    other.write_text(card.read_text().replace("relative = [true, false]", "relative = []"))
    said = evaluate(*data[:1], other, *data[2:-1], tmp_path / "no")
    assert "relative actions: dataset: absolute; checkpoint: relative in dimensions 0" in said
    said = evaluate("--protocol", tmp_path / "toy.toml", "--out", tmp_path / "played", "--workers", 1)
    assert "does not fit protocol 'toy'" in said and "control mode" in said
    card.write_text(
        card.read_text().replace("joint_position", "delta_position").replace("[true, false]", "[]")
    )
    said = evaluate("--protocol", tmp_path / "toy.toml", "--out", tmp_path / "played", "--workers", 1)
    assert "all tasks" in said and (tmp_path / "played" / "result.json").is_file()


def test_the_file_beside_a_checkpoint_is_parsed_once_while_it_loads(
    exported: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
):
    parsed: list[Path] = []
    plain = values.plain_text

    def counted(path: Path) -> str:
        parsed.append(path)
        return plain(path)

    monkeypatch.setattr(values, "plain_text", counted)
    for read_it in (checkpoints.load, checkpoints.inspect, checkpoints.declaration):
        parsed.clear()
        read_it(exported["lerobot"])
        assert parsed == [exported["lerobot"] / "agreement.json"]


def test_an_export_of_an_export_keeps_it_and_so_do_adapters(
    trained: Path, exported: Mapping[str, Path], tmp_path: Path
):
    export(exported["transformers"], "vlafit", tmp_path / "back")
    assert said_of_data(tmp_path / "back")["action conversion"] == SIGN
    loaded = checkpoints.load(trained["pi0"])
    plan = vlafit.apply_strategy(loaded.policy, "lora")
    agreement = read(trained["pi0"])
    checkpoints.save(loaded.policy, tmp_path / "adapted", loaded.codec, plan=plan, agreement=agreement)
    export(tmp_path / "adapted", "transformers", tmp_path / "peft")
    for made in (tmp_path / "peft", tmp_path / "peft" / "base"):
        assert said_of_data(made)["action conversion"] == SIGN
        codec = checkpoints.load(made).codec
        assert codec is not None and codec.embodiment.control == "joint_position"


def policies(target: str, folder: Path, tmp_path: Path) -> checkpoints.Loaded:
    """A checkpoint of the family that only this program has."""
    if target == "openvla":
        words = train_word_tokenizer(["put the bowl on the plate"], 300)
        return checkpoints.load(write_plain(tmp_path / "plain"), config=PLAIN | FRONT, tokenizer=words)
    loaded = checkpoints.load(folder, tokenizer=TOKENIZER, assets=LIBERO)
    return loaded._replace(codec=fitted(loaded.policy))


@pytest.mark.parametrize("target", sorted(set(registry.writable()) - {*TRAINED, "vlafit"}))
def test_every_other_program_s_folder_keeps_it_too(target: str, folder: Path, tmp_path: Path):
    policy, codec, _, _ = policies(target, folder, tmp_path)
    assert codec is not None
    robot = replace(
        codec.embodiment,
        hz=10.0,
        control="joint_position",
        action=replace(codec.embodiment.action, unit="rad"),
    )
    codec = codec.with_changes(embodiment=robot)
    item = Item("action conversion", {"dataset": SIGN}, SIGN, "same")
    agreement = Agreement((item,), codec.config.cameras, codec.config.relative)
    checkpoints.save(policy, tmp_path / "native", codec, agreement=agreement)
    export(tmp_path / "native", target, tmp_path / "out")
    assert said_of_data(tmp_path / "out") == {"action conversion": SIGN}
    again = checkpoints.load(tmp_path / "out").codec
    assert again is not None
    mine, own = again.embodiment, robot
    facts = lambda r: (r.hz, r.control, r.action.unit, r.state.labels, r.cameras)  # noqa: E731
    assert facts(mine) == facts(own)
    declared = checkpoints.declaration(tmp_path / "out").embodiment
    assert declared is not None and declared.control == "joint_position"
