"""The contract of checkpoint formats: every registered one keeps it, and others can add one from outside."""

import importlib
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vlafit
from tests.checkpoints import outside_family
from tests.policies.tiny import random_policy
from vlafit import checkpoints, cli
from vlafit.checkpoints.export import export, write
from vlafit.checkpoints.formats import registry
from vlafit.checkpoints.formats.base import CheckpointFiles, Format
from vlafit.errors import ConfigError, WeightsError

MODULE = "tests.checkpoints.outside_format"


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An installed package that adds the format of outside_format.py by an entry point."""
    site = tmp_path / "site"
    info = site / "slashes-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: slashes\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\nslashes = {MODULE}:FORMAT\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(site)])
    importlib.invalidate_caches()
    yield info
    importlib.invalidate_caches()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the format from outside."""
    folder = tmp_path_factory.mktemp("made") / "slashes"
    write(random_policy("pi0-tiny"), None, MODULE, folder, "here")
    return folder


# ------------------------------------------------------------------------------------------ every format


def test_the_registry_begins_with_vlafits_own_and_ends_with_installed_ones(outside: Path):
    names = [one.name for one in registry.all_formats()]
    assert names[0] == "native" and names[-1] == "slashes"
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("format", list(registry.all_formats()), ids=lambda one: one.name)
def test_every_format_takes_nothing_for_its_own_that_is_not(format: Format, tmp_path: Path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    for path in (tmp_path, tmp_path / "model.safetensors", tmp_path / "nothing"):
        assert not format.detect(CheckpointFiles(path))


@pytest.mark.parametrize("format", list(registry.writable().values()), ids=lambda one: one.target)
def test_every_format_that_is_written_is_found_by_its_target_and_refuses_with_reasons(format: Format):
    assert registry.writer(format.target) is format and registry.named(format.name) is format
    policy = outside_family.build(outside_family.SIZES["tiny"], "cpu")
    assert all(reason for reason in format.refusals(policy, None))
    assert all(isinstance(format.keeps_float32(info, policy), bool) for info in policy.parts())


@pytest.mark.parametrize("format", list(registry.all_formats()), ids=lambda one: one.name)
def test_option_tables_have_one_purpose_and_layouts_no_common_beginning(format: Format):
    assert all(table.purpose for table in format.options)
    others = [p for kind, begin in registry.layouts().items() if kind not in format.layouts for p in begin]
    own = [p for begin in format.layouts.values() for p in begin]
    assert not any(a.startswith(b) or b.startswith(a) for a in own for b in others)


def test_what_is_no_format_names_those_that_are_known(tmp_path: Path):
    save_file({"some.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError) as caught:
        vlafit.load_policy(tmp_path)
    for fact in ("some.weight", "native", "openpi", "LeRobot", "transformers", "--format"):
        assert fact in str(caught.value)


# ---------------------------------------------------------------------------------------- from outside


def test_a_format_that_the_caller_names_loads_what_it_wrote_bit_for_bit(written: Path):
    loaded = checkpoints.load(written, format=MODULE)
    assert (loaded.report.form, loaded.report.family) == ("slashes", "pi0")
    expected = dict(random_policy("pi0-tiny").named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in loaded.policy.named_parameters())
    assert checkpoints.inspect(written, format=MODULE).report.parameters == loaded.report.parameters


def test_without_an_entry_point_it_is_not_known(written: Path):
    with pytest.raises(WeightsError, match="no known format"):
        vlafit.load_policy(written)
    with pytest.raises(ConfigError, match="no checkpoint format 'slashes'"):
        checkpoints.load(written, format="slashes")


def test_an_installed_format_is_detected_exported_to_and_on_the_command_line(
    outside: Path, written: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert checkpoints.load(written).report.form == "slashes"
    native = tmp_path / "native"
    export(written, "vlafit", native)
    made = export(native, "slashes", tmp_path / "back")
    assert set(made.files) == {"model.safetensors", "slashes.json", "README.md"}
    one, two = (load_file(folder / "model.safetensors") for folder in (written, tmp_path / "back"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert cli.main(["inspect", str(written), "--format", MODULE]) == 0
    assert "slashes checkpoint of pi0" in capsys.readouterr().out
    out = str(tmp_path / "by_module")
    assert cli.main(["export", str(written), "--format", MODULE, "--to", MODULE, "--out", out]) == 0


def test_the_config_of_a_format_from_outside_is_inferred_and_its_damage_named(outside: Path, written: Path):
    tensors = load_file(written / "model.safetensors")
    name = "vision/layers/1/mlp/fc1/weight"
    for damaged, fact in (
        ({n: t for n, t in tensors.items() if n != name}, "missing"),
        ({**tensors, name: tensors[name][:-1].clone()}, "misshapen"),
        ({**tensors, name: torch.full_like(tensors[name], torch.nan)}, "not finite"),
        ({**tensors, "vision/more": torch.zeros(2)}, "surplus"),
    ):
        folder = written.parent / fact
        folder.mkdir()
        save_file(damaged, folder / "model.safetensors")
        (folder / "slashes.json").write_text((written / "slashes.json").read_text())
        with pytest.raises(WeightsError) as caught:
            vlafit.load_policy(folder)
        assert fact in str(caught.value) and ("vision/more" if fact == "surplus" else name) in str(
            caught.value
        )


def test_ours_are_tried_first_and_never_import_an_installed_format(
    monkeypatch: pytest.MonkeyPatch, outside: Path, tmp_path: Path
):
    (outside / "entry_points.txt").write_text(f"[{registry.GROUP}]\nbroken = no_such_module:FORMAT\n")
    importlib.invalidate_caches()
    vlafit.save_checkpoint(random_policy("pi0-tiny"), tmp_path / "native")
    assert checkpoints.load(tmp_path / "native").report.form == "native"
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError) as caught:
        vlafit.load_policy(tmp_path / "model.safetensors")
    for fact in ("entry point 'broken' of slashes", "no_such_module", "uninstall"):
        assert fact in str(caught.value)


def test_a_module_that_only_the_checkpoint_names_is_never_imported(tmp_path: Path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    marker = "tests.checkpoints.never_imported"
    (tmp_path / "config.json").write_text(
        f'{{"format": "{marker}", "auto_map": {{"AutoModel": "{marker}"}}}}'
    )
    with pytest.raises(WeightsError, match="no known format"):
        vlafit.load_policy(tmp_path)
    assert marker not in sys.modules


@pytest.mark.parametrize(("name", "fact"), [("no.such", "cannot be imported"), ("json.decoder", "no FORMAT")])
def test_a_module_that_is_no_format_is_one_error(written: Path, name: str, fact: str):
    with pytest.raises(ConfigError, match=fact):
        checkpoints.load(written, format=name)


def test_the_group_is_the_one_that_the_documents_name():
    assert registry.GROUP == "vlafit.formats"
    assert all(isinstance(point, EntryPoint) for point in entry_points(group=registry.GROUP))


# ------------------------------------------------------------- a family that no other program saves


def test_a_family_outside_the_package_without_shapes_is_saved_loaded_and_exported_natively(tmp_path: Path):
    policy = outside_family.build(outside_family.SIZES["tiny"], "cpu")
    vlafit.save_checkpoint(policy, tmp_path / "c")
    loaded = checkpoints.load(tmp_path / "c", config={"vision.heads": 4})
    assert type(loaded.policy).__name__ == "Outside" and loaded.policy.config.vision.heads == 4
    made = export(tmp_path / "c", "vlafit", tmp_path / "out", dtype="bfloat16")
    assert made.cast_error is not None
    again = checkpoints.load(tmp_path / "out").policy
    expected = dict(policy.named_parameters())
    assert again.state_dict().keys() == expected.keys()
    plan = vlafit.apply_strategy(policy, [{"select": {"kind": "mlp"}, "mode": "lora"}, {"mode": "frozen"}])
    vlafit.save_checkpoint(policy, tmp_path / "tuned", plan=plan)
    assert export(tmp_path / "tuned", "vlafit", tmp_path / "merged", merge=True).merge_error is not None


def test_a_foreign_format_of_a_family_without_shapes_is_one_error(written: Path, tmp_path: Path):
    class Wrong(type(registry.named(MODULE))):
        def open(self, files, options, opener):
            from dataclasses import replace

            return replace(super().open(files, options, opener), family=outside_family.__name__)

    module = type(sys)("wrong_format_module.inner")
    module.FORMAT = Wrong()
    sys.modules["wrong_format_module"] = type(sys)("wrong_format_module")
    sys.modules["wrong_format_module.inner"] = module
    try:
        with pytest.raises(WeightsError, match="declares no SHAPES"):
            checkpoints.load(written, format="wrong_format_module.inner")
    finally:
        del sys.modules["wrong_format_module"], sys.modules["wrong_format_module.inner"]
