"""Modules that users name, and the options that messages name."""

import ast
import re
import sys
from pathlib import Path

import pytest

import vlafit
from vlafit import envs, policies
from vlafit.checkpoints.formats import registry
from vlafit.cli.parser import fields
from vlafit.datasets import layouts
from vlafit.entry_points import is_module
from vlafit.errors import ConfigError
from vlafit.recipe import Recipe

PACKAGE = Path(vlafit.__file__).parent
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9_.-]*[a-z0-9]")
OTHER_PROGRAMS = {  # accelerate, torchrun, apt-get, git, hf, aws, docker, openpi
    "--multi_gpu", "--num_processes", "--num-processes", "--nproc_per_node", "--nproc-per-node", "--cpu",
    "--main_process_port", "--config_file", "--config-file", "--no-install-recommends", "--porcelain",
    "--revision", "--repo-type", "--recursive", "--shm-size", "--policy.dir", "--dir", "--local-dir",
    "--budget", "--tone", "--ink",  # the beginning of three options; CSS
    "--no-parent",  # wget
}  # fmt: skip


def test_a_module_of_one_word_is_found_without_running_it_but_never_for_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "lone_module.py").write_text("raise SystemExit('was run')")
    monkeypatch.syspath_prepend(tmp_path)
    assert is_module("lone_module") and "lone_module" not in sys.modules
    assert not is_module("no_such_module") and not is_module("no_such.module") and not is_module("a-b")
    for look in (layouts.load, registry.named, registry.writer, envs.expert):
        with pytest.raises(SystemExit, match="was run"):
            look("lone_module")
    with pytest.raises(SystemExit, match="was run"):
        policies.build_family("lone_module", "tiny")
    with pytest.raises(ConfigError, match="--trust lone_module"):  # as a checkpoint would name it
        policies.family("lone_module")


def test_every_option_that_a_message_names_is_an_option_of_some_command():
    own = {f"--{field.name}" for field in fields(Recipe, Recipe())} | {"--help", "--version", "--traceback"}
    named: dict[str, str] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                own |= {
                    a.value for a in node.args if isinstance(a, ast.Constant) and str(a.value)[:2] == "--"
                }
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for option in OPTION.findall(node.value):
                    named.setdefault(option, f"{path.relative_to(PACKAGE)}:{node.lineno}")
    tables = ("--policy.config.", "--adapt.cameras.", "--data.validation_sets.")
    unknown = {o: where for o, where in named.items() if o not in own | OTHER_PROGRAMS}
    assert {o: w for o, w in unknown.items() if not o.startswith(tables)} == {}
