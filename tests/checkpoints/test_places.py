"""Whatever a user has at hand, a run or an address, is answered with its checkpoint or the way to it."""

import shutil
from pathlib import Path

import pytest

import vlafit
from tests.policies.tiny import random_policy
from vlafit import checkpoints, pointers
from vlafit.cli.places import checkpoint_folder
from vlafit.datasets import load_card
from vlafit.errors import ConfigError, VlafitError, WeightsError

LEROBOT = Path(__file__).parents[1] / "fixtures" / "lerobot_smolvla"
OPENPI = Path(__file__).parents[1] / "fixtures" / "openpi_jax" / "ckpt_training"


def lerobot_run(folder: Path) -> Path:
    for step in ("000500", "001000"):
        shutil.copytree(LEROBOT, folder / "checkpoints" / step / "pretrained_model")
        (folder / "checkpoints" / step / "training_state").mkdir()
    return folder


@pytest.mark.case(
    section="checkpoints",
    report="`there is no such checkpoint`",
    user_has="the folder of a LeRobot or openpi run",
    now="its last checkpoint is used",
)
@pytest.mark.parametrize("named", ["", "checkpoints", "checkpoints/001000"])
def test_a_run_of_lerobot_means_its_last_checkpoint(tmp_path: Path, named: str):
    run = lerobot_run(tmp_path / "run")
    last = run / "checkpoints" / "001000" / "pretrained_model"
    assert checkpoints.place(run / named).path == last
    assert checkpoint_folder(str(run / named), foreign=True) == last
    assert checkpoints.inspect(run / named).report.form == "LeRobot"


def test_the_last_checkpoint_of_lerobot_is_the_one_that_its_link_names(tmp_path: Path):
    run = lerobot_run(tmp_path / "run")
    (run / "checkpoints" / "last").symlink_to("000500")  # resumed from an earlier step
    earlier = run / "checkpoints" / "000500" / "pretrained_model"
    assert checkpoints.place(run).path == checkpoints.place(run / "checkpoints").path == earlier
    assert checkpoints.place(run / "checkpoints" / "last").path.resolve() == earlier
    (run / "checkpoints" / "last").unlink()
    (run / "checkpoints" / "last").symlink_to("002000")  # deleted since, or not copied
    assert checkpoints.place(run).path == run / "checkpoints" / "001000" / "pretrained_model"


def test_an_earlier_step_of_lerobot_is_that_step(tmp_path: Path):
    run = lerobot_run(tmp_path / "run")
    assert checkpoints.place(run / "checkpoints" / "000500").path.parent.name == "000500"


def test_a_run_of_openpi_means_its_last_checkpoint():
    assert checkpoints.place(OPENPI).path == OPENPI / "5"
    assert checkpoints.inspect(OPENPI, config={"chunk": 6}).report.form.startswith("openpi")


@pytest.mark.parametrize(
    ("named", "fact"), [("", "holds 1 checkpoints"), ("step_000005/model.safetensors", "one file of a")]
)
def test_what_is_almost_a_checkpoint_is_refused_with_the_folder_to_name(
    tmp_path: Path, named: str, fact: str
):
    folder = tmp_path / "run" / "checkpoints" / "step_000005"
    vlafit.save_checkpoint(random_policy("pi0-tiny"), folder)
    place = folder.parent / named
    for find in (lambda: checkpoint_folder(str(place), foreign=True), lambda: checkpoints.place(place)):
        with pytest.raises(ConfigError) as caught:
            find()
        assert all(text in str(caught.value) for text in (f"{place} ", fact, f": {folder}"))


def test_a_checkpoint_that_its_run_deletes_is_told_from_a_foreign_one(tmp_path: Path):
    gone = tmp_path / "run" / "checkpoints" / "step_000004"
    gone.mkdir(parents=True)
    with pytest.raises(WeightsError, match=f"{gone}.*train.keep") as caught:
        checkpoints.load(gone)
    assert "--format" not in str(caught.value)


@pytest.mark.case(
    section="checkpoints",
    report="`none of model.safetensors ...`, or a word on agreement.json",
    user_has="a run that was killed before its first checkpoint, or whose checkpoints were deleted",
    now="an error that says so, with the command that goes on",
)
@pytest.mark.parametrize(
    "held", [("plan.json", "agreement.json"), ("run.json",), ("checkpoints/last.json",), ()]
)
def test_a_run_without_a_checkpoint_is_named_as_one(tmp_path: Path, held: tuple[str, ...]):
    run = tmp_path / "run"
    for name in ("recipe.toml", *held):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text('{"path": "step_000004"}' if name.endswith("last.json") else "")
    for ask in (lambda p: checkpoint_folder(str(p), foreign=True), checkpoints.place, checkpoints.inspect):
        with pytest.raises(VlafitError, match=rf"^{run}.*no checkpoint.*--out {run} --resume"):
            ask(run)


def test_a_checkpoint_is_never_taken_for_a_run(tmp_path: Path):
    vlafit.save_checkpoint(random_policy("pi0-tiny"), tmp_path / "c")
    lerobot_run(tmp_path / "c" / "run")
    assert (
        pointers.in_run(tmp_path / "c") is None and checkpoints.place(tmp_path / "c").path == tmp_path / "c"
    )
    assert pointers.in_run(LEROBOT) is None
    (tmp_path / "empty").mkdir()
    assert pointers.in_run(tmp_path / "empty") is None


ADDRESSES = [
    (
        "gs://openpi-assets/checkpoints/pi0_base",
        ["gcloud storage cp -r gs://openpi-assets", "maybe_download"],
    ),
    ("s3://bucket/run/5000", ["aws s3 cp --recursive s3://bucket/run/5000 5000"]),
    ("https://huggingface.co/lerobot/pi0_base", ["by its id: lerobot/pi0_base"]),
    ("https://huggingface.co/lerobot/pi0_base/tree/v1.2", ["by its id: lerobot/pi0_base@v1.2"]),
    ("hf://lerobot/pi0_base", ["by its id: lerobot/pi0_base"]),
    ("https://huggingface.co/datasets/lerobot/pusht", ["dataset", "data.cards", '["lerobot/pusht"]']),
    ("https://huggingface.co/lerobot/pi0_base/tree/main?not-for-all=1", ["by its id: lerobot/pi0_base"]),
    ("hf://datasets/lerobot/pusht/blob/main/README.md", ["dataset", '["lerobot/pusht"]']),
    ("https://huggingface.co/spaces/lab/demo", ["download its files"]),
    ("https://example.org/weights", ["download its files", "weights"]),
]


@pytest.mark.case(
    section="checkpoints",
    report="`there is no such checkpoint`",
    user_has="`gs://openpi-assets/...`, `https://huggingface.co/...`",
    now="the way to get the files, or the id",
)
@pytest.mark.parametrize(("address", "facts"), ADDRESSES)
def test_an_address_is_answered_with_the_way_to_its_files(address: str, facts: list[str]):
    for ask in (checkpoints.place, checkpoints.inspect, checkpoint_folder):
        with pytest.raises(WeightsError) as caught:
            ask(address)
        assert all(fact in str(caught.value) for fact in (address, *facts))


@pytest.mark.case(
    section="checkpoints",
    report="`vlafit opens local folders and ids of the Hub`, or a traceback of pathlib",
    user_has="a checkpoint's folder that is called s3, gs or http, or begins with `~`",
    now="it is a folder like any other",
)
@pytest.mark.parametrize("name", ["s3", "gs", "http", "hf", "~old-robot"])
def test_a_folder_may_be_called_like_a_scheme_or_begin_with_a_tilde(name: str, tmp_path: Path, monkeypatch):
    shutil.copytree(LEROBOT, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert checkpoints.place(name).path == Path(name)
    with pytest.raises(ConfigError, match="~nobody-here"):
        checkpoints.place("~nobody-here")
    with pytest.raises(ConfigError, match="~nobody-here"):
        load_card("~nobody-here/card.toml")


def test_a_folder_of_several_checkpoints_or_runs_is_answered_with_their_names(tmp_path: Path):
    for name in ("one", "two"):
        (tmp_path / "several" / name).mkdir(parents=True)
        (tmp_path / "several" / name / "model.safetensors").touch()
    run = tmp_path / "runs" / "mine" / "checkpoints" / "step_000003"
    run.mkdir(parents=True)
    (run / "policy.json").touch()
    (tmp_path / "runs" / "notes.txt").touch()
    (tmp_path / "runs" / "data").mkdir()
    for folder, names in (("several", ["one", "two"]), ("runs", ["mine"])):
        for foreign in (False, True):
            said = f"is no checkpoint, but holds {len(names)}; name one:"
            with pytest.raises(ConfigError, match=said) as caught:
                checkpoint_folder(str(tmp_path / folder), foreign=foreign)
            listed = str(caught.value).splitlines()[1:]
            assert listed == [f"  {tmp_path / folder / name}" for name in names]
    (tmp_path / "several" / "config.json").touch()  # a checkpoint of parts
    assert checkpoint_folder(str(tmp_path / "several"), foreign=True) == tmp_path / "several"
    pure = OPENPI.with_name("ckpt_pure")  # holds params/, which holds _METADATA
    assert checkpoint_folder(str(pure), foreign=True) == pure
