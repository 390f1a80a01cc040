"""What files name as the robot's weights (domain, row of tables) holds, whether or not they make a codec."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vlafit
from tests.checkpoints.forms import GROOT, GROOT_CHAT, save, write_nvidia_groot
from tests.checkpoints.test_xvla import edit, step_of
from vlafit import checkpoints
from vlafit.checkpoints.formats import registry
from vlafit.checkpoints.formats.base import CheckpointFiles
from vlafit.checkpoints.formats.peft import write as peft_folder
from vlafit.errors import VlafitError, WeightsError
from vlafit.policies import family_name

XVLA = Path(__file__).parents[1] / "fixtures" / "lerobot_xvla"
SQUARE: dict[str, object] = {"image_size": 64}  # frames of that folder are no squares
PRE = "policy_preprocessor.json"
NVIDIA = Path(__file__).parents[1] / "fixtures" / "groot_processors"


@pytest.fixture
def xvla(tmp_path: Path) -> Path:
    return Path(shutil.copytree(XVLA, tmp_path / "xvla"))


@pytest.fixture
def groot(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GROOT, tmp_path / "groot"))


@pytest.mark.parametrize("look", [checkpoints.load, checkpoints.inspect])
def test_the_domain_of_processors_that_make_no_codec_is_the_policys(look: Callable, xvla: Path):
    read = look(xvla, config=SQUARE)
    assert read.codec is None and read.policy.config.domain == 3  # frames of 64x96
    assert any("domain 3 of 0 to 4" in note and PRE in note for note in read.report.notes)
    (xvla / "policy_postprocessor.json").unlink()
    assert look(xvla, config=SQUARE).policy.config.domain == 3
    assert look(xvla, config=SQUARE | {"domain": 1}).policy.config.domain == 1
    (xvla / PRE).unlink()
    read = look(xvla, config=SQUARE)
    assert read.policy.config.domain == 0
    assert any("no file names a domain" in note and "domain=N" in note for note in read.report.notes)


@pytest.mark.parametrize("look", [checkpoints.load, checkpoints.inspect])
def test_a_domain_that_the_policy_lacks_is_refused_where_the_processors_name_it(look: Callable, xvla: Path):
    edit(xvla / PRE, lambda v: step_of(v, "xvla_add_domain_id").update(domain_id=7))
    with pytest.raises(
        WeightsError, match=r"policy_preprocessor.json: step 5 .*domain_id is 7.*0 to 4.*domain=N"
    ):
        look(xvla, config=SQUARE)
    assert look(xvla, config=SQUARE | {"domain": 4}).policy.config.domain == 4


@pytest.mark.parametrize("look", [checkpoints.load, checkpoints.inspect])
def test_a_row_that_the_tables_lack_is_refused_where_the_processors_name_it(look: Callable, groot: Path):
    def change(values: dict[str, Any]) -> None:
        step_of(values, "groot_n1_7_pack_inputs_v1")["embodiment_mapping"]["new_embodiment"] = 40

    edit(groot / PRE, change)
    with pytest.raises(WeightsError) as caught:
        look(groot, config=GROOT_CHAT)
    text = str(caught.value)
    for fact in (PRE, "embodiment_mapping", "'new_embodiment'", "row 40", "0 to 31", "embodiment_rows=[N]"):
        assert fact in text
    assert "surplus" not in text and "fresh" not in text
    rows = look(groot, config=GROOT_CHAT | {"embodiment_rows": [3]}).policy.config.embodiment_rows
    assert rows == (3,)


@pytest.fixture
def nvidia(tmp_path: Path) -> Path:
    save(write_nvidia_groot(tmp_path), tmp_path)
    edit(tmp_path / "config.json", lambda v: v.update(image_target_size=[32, 32]))
    for name in ("processor_config.json", "statistics.json", "embodiment_id.json"):
        shutil.copy(NVIDIA / name, tmp_path)
    return tmp_path


def test_a_row_that_the_tables_lack_is_refused_where_nvidias_files_name_it(nvidia: Path):
    edit(nvidia / "embodiment_id.json", lambda v: v.update(libero_sim=40))
    with pytest.raises(WeightsError, match=r"embodiment_id.json: .*'libero_sim' has the row 40.*0 to 31"):
        checkpoints.inspect(
            nvidia, config=GROOT_CHAT, tokenizer=GROOT / "char_tokenizer", assets="libero_sim"
        )
    other: dict[str, object] = {**GROOT_CHAT, "embodiment_rows": [3]}
    assert checkpoints.inspect(nvidia, config=other).policy.config.embodiment_rows == (3,)


def test_a_row_that_no_file_tells_is_noted(nvidia: Path):
    read = checkpoints.inspect(nvidia, config=GROOT_CHAT)
    assert read.policy.config.embodiment_rows == (10,)
    assert any("libero_sim" in n and "row 10" in n and "embodiment_rows" in n for n in read.report.notes)
    for name in ("processor_config.json", "statistics.json", "embodiment_id.json"):
        (nvidia / name).unlink()
    read = checkpoints.inspect(nvidia, config=GROOT_CHAT)
    assert any("no file names a robot" in n and "row 10" in n for n in read.report.notes)
    read = checkpoints.inspect(nvidia, config=GROOT_CHAT | {"embodiment_rows": [3]})
    assert not any("row" in note for note in read.report.notes)


# --------------------------------------------------------------------------------------------------- adapters


def adapters_of(base: Path, config: dict[str, object], folder: Path) -> Path:
    """Write LoRA on the expert of the policy in `base` as a PEFT folder, with the base's files beside it."""
    policy = checkpoints.load(base, config=config).policy
    rule = {"select": {"part": "expert", "kind": "attention"}, "mode": "lora", "rank": 2}
    plan = vlafit.apply_strategy(policy, [rule, {"mode": "frozen"}])
    support = registry.detect(CheckpointFiles(base)).adapters
    assert support is not None
    names = support.names(family_name(policy))
    assert names is not None
    folder.mkdir()
    peft_folder.write(folder, peft_folder.take(policy, plan, names), base)
    for path in base.iterdir():
        if path.name == "config.json" or path.name.startswith("policy_"):
            shutil.copy(path, folder)
    return folder


def test_the_domain_of_processors_beside_adapters_holds(xvla: Path, tmp_path: Path):
    folder = adapters_of(xvla, SQUARE, tmp_path / "adapters")

    def opened(**config: object) -> checkpoints.Loaded:
        return checkpoints.inspect(folder, base=xvla, config=SQUARE | config)

    assert opened().policy.config.domain == 3
    edit(folder / PRE, lambda v: step_of(v, "xvla_add_domain_id").update(domain_id=2))
    assert opened().policy.config.domain == 2 and opened(domain=1).policy.config.domain == 1
    (two,) = [one for one in checkpoints.declaration(folder, xvla).overruled if one.name == "domain"]
    assert two.stated.endswith(f"{PRE}: 3") and two.used.endswith(f"{PRE}: 2")
    edit(folder / PRE, lambda v: step_of(v, "xvla_add_domain_id").update(domain_id=5))
    with pytest.raises(VlafitError, match=r"policy_preprocessor.json.*domain"):
        opened()


def test_the_row_of_processors_beside_adapters_holds(groot: Path, tmp_path: Path):
    folder = adapters_of(groot, GROOT_CHAT, tmp_path / "adapters")
    pack = "groot_n1_7_pack_inputs_v1"

    def opened(**config: object) -> checkpoints.Loaded:
        return checkpoints.inspect(folder, base=groot, config=GROOT_CHAT | config)

    assert opened().policy.config.embodiment_rows == (10,) and opened().policy.config.chunk == 8
    edit(folder / PRE, lambda v: step_of(v, pack).update(embodiment_tag="libero_sim"))
    assert opened().policy.config.embodiment_rows == (2,)
    assert opened(embodiment_rows=[3]).policy.config.embodiment_rows == (3,)
    edit(folder / PRE, lambda v: step_of(v, pack)["embodiment_mapping"].update(libero_sim=40))
    with pytest.raises(VlafitError, match=r"policy_preprocessor.json.*embodiment_rows.*0 to 31"):
        opened()
