"""What the documents say is true of this commit: paths, commands, options, TOML, Python, numbers.

Links are in test_links.py.
"""

import dataclasses
import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vlafit import cli, shipped
from vlafit.checkpoints.hub import parse
from vlafit.cli.parser import Parser
from vlafit.codec.tokenizer import train_word_tokenizer
from vlafit.datasets import load_card
from vlafit.errors import VlafitError
from vlafit.policies import families
from vlafit.recipe import OptimRecipe, Recipe
from vlafit.train.optim import schedule
from vlafit.tuning import load_strategy

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LOG.md", "eval/README.md", *PAGES]
GUIDES = ["README.md", *PAGES]  # what users copy commands from
RESULTS = ROOT / "eval" / "results"
PUBLIC = {  # ids of the Hugging Face Hub
    *("lerobot/pi0_base", "lerobot/pi05_base", "lerobot/smolvla_base"),
    *("lerobot/pi05_libero_finetuned", "lerobot/pi0_libero_finetuned", "HuggingFaceVLA/smolvla_libero"),
}
THEIR_OWN = {
    "openpi_pi0_base",
    "openvla-7b",
    "pytorch_model.bin",
    "pi05_libero",
    "pi0_libero",
    "oft",
}  # files that a reader has, or downloads
LAUNCH = "-m vlafit "


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(name), flags=re.DOTALL | re.MULTILINE)


def commands(name: str) -> list[str]:
    """Every `vlafit VERB ...` of a document: lines of its shell blocks, and whole commands in its text."""
    lines = [line for block in blocks(name, "sh") for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```", "", text_of(name), flags=re.DOTALL | re.MULTILINE)
    quoted = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    whole = re.compile(
        rf"vlafit ({'|'.join(cli.VERBS)}) (?!-)"
    )  # not `vlafit export --merge`, an option's name
    return [line for line in lines if line.startswith("vlafit ") or LAUNCH in line] + [
        code for code in quoted if whole.match(code)
    ]


EVERY_COMMAND = [(name, line) for name in [*GUIDES, "eval/README.md"] for line in commands(name)]


@pytest.fixture
def readers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the TOML files that the guides spell out, and a dataset, as a reader has it."""
    for name in GUIDES:
        for block in blocks(name, "toml"):
            first = block.splitlines()[0].removeprefix("# ")
            if first.endswith(".toml"):
                (tmp_path / first).write_text(block, encoding="utf-8")
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "dataset").symlink_to(
        ROOT / "tests" / "fixtures" / "lerobot_datasets" / "image"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Parsed(Exception):
    """Ends a verb once its options are read."""


def options_of(line: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Recipe | None, dict[str, Any]]:
    """Return verb, recipe and options of a command, read by the verb's own parser. Raises its errors."""
    words = shlex.split(
        line.split(LAUNCH)[-1] if LAUNCH in line else line.removeprefix("vlafit "), comments=True
    )
    verb, *arguments = words
    assert verb in cli.VERBS, line
    module = import_module(f"vlafit.cli.verbs.{verb.replace('-', '_')}")
    if hasattr(module, "read"):  # train, compare, sweep: a recipe with every field as an option
        recipe, *others = module.read(arguments)
        strategies = [",".join(o.strategies) for o in others if hasattr(o, "strategies")]
        return verb, recipe, {"strategies": "".join(strategies)}
    real = Parser.read

    def read_only(self: Parser, arguments: Sequence[str]) -> None:
        raise Parsed(real(self, arguments))

    monkeypatch.setattr(Parser, "read", read_only)
    with pytest.raises(Parsed) as caught:
        module.run(arguments)
    return verb, None, vars(caught.value.args[0])


def require_checkpoint(name: str) -> None:
    """A checkpoint is one that ships, a public one, a run, or a file that the reader has."""
    if name in THEIR_OWN or name.startswith("runs/"):
        return
    hub = parse(name)
    if hub is not None and "/" in name:
        assert hub[0] in PUBLIC
        return
    shipped.find("checkpoint", name)


def require_names(recipe: Recipe | None, options: dict[str, Any]) -> None:
    """Every name of a command is that of a shipped file, or of a file that the reader has."""
    for kind in ("protocol", "study", "card"):
        if options.get(kind):
            shipped.find(kind, options[kind])
    for name in [options.get("strategy"), *(options.get("strategies") or "").split(",")]:
        if name:
            load_strategy(name)
    if options.get("checkpoint") and not (options.get("size") and options["checkpoint"] in families()):
        require_checkpoint(options["checkpoint"])
    if recipe is None:
        return
    load_strategy(recipe.strategy)
    for card in recipe.data.cards:
        load_card(card)
    if recipe.policy.checkpoint:
        require_checkpoint(recipe.policy.checkpoint)
    if recipe.eval.protocol:
        shipped.find("protocol", recipe.eval.protocol)


# ------------------------------------------------------------------------------ paths, pages and the tree


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_path_in_code_type_exists(name: str):
    paths = re.findall(r"`((?:vlafit|configs|data|eval|tests|benchmarks|docs)/[\w./-]+)`", text_of(name))
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_index_and_the_readme_link_every_page():
    for page in {name.removeprefix("docs/") for name in PAGES} - {"index.md"}:
        assert f"({page})" in text_of("docs/index.md")
        assert f"(docs/{page})" in text_of("README.md") or page == "api.md"  # made for the site


def test_the_tree_in_contributing_is_that_of_the_package():
    tree = text_of("CONTRIBUTING.md").split("vlafit/              the verbs")[1].split("tests/ ")[0]
    named = {
        word.rstrip("/")
        for line in tree.splitlines()[1:]
        for word in re.findall(r"[\w]+(?:/|\.py)", line[:20])
    }
    named |= set(re.findall(r"\w+\.py", tree))
    there = {path.name for path in (ROOT / "vlafit").iterdir() if not path.name.startswith("_")}
    assert named == there - {"py.typed"}


# --------------------------------------------------------------------------------------------- commands


def test_the_guides_show_every_verb():
    shown = {line.split(LAUNCH)[-1].removeprefix("vlafit ").split()[0] for _, line in EVERY_COMMAND}
    assert shown == set(cli.VERBS)


@pytest.mark.parametrize(("name", "line"), EVERY_COMMAND)
def test_a_command_has_options_and_names_that_exist(name, line, readers_folder, monkeypatch):
    _, recipe, options = options_of(line, monkeypatch)
    require_names(recipe, options)
    for file in re.findall(r"--config_file (\S+)", line):
        assert (ROOT / file).is_file()


CHEAP = sorted(
    {line for _, line in EVERY_COMMAND if re.match(r"vlafit (list|(inspect|export) metaworld-base)\b", line)}
)


@pytest.mark.parametrize("line", CHEAP)
def test_a_command_that_needs_no_data_runs(line, readers_folder, capsys):
    assert cli.main(shlex.split(line, comments=True)[1:]) == 0
    assert capsys.readouterr().out


def test_a_wrong_option_or_name_in_a_document_would_be_noticed(readers_folder, monkeypatch):
    for line in (
        "vlafit train quickstart --optim.rate 1e-4",
        "vlafit eval metaworld-base --protocol metaworld-fauce",
        "vlafit inspect metaworld-base --strategy lorra",
        "vlafit inspect lerobot/pi0_bas",
    ):
        with pytest.raises((VlafitError, AssertionError)), monkeypatch.context() as patch:
            _, recipe, options = options_of(line, patch)
            require_names(recipe, options)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_target_of_make_exists(name: str):
    lines = [line for block in blocks(name, "sh") for line in block.splitlines()]
    code = [*lines, *re.findall(r"`(make [^`]+)`", text_of(name))]
    asked = {word for line in code for word in re.findall(r"\bmake (?:[A-Z]+=\S+ )*([a-z][\w-]*)", line)}
    assert asked - set(re.findall(r"^([a-z][\w-]*):", text_of("Makefile"), flags=re.MULTILINE)) == set()


# ----------------------------------------------------------------------------------- TOML, fields, Python


def fields(cls: type, prefix: str = "") -> set[str]:
    names: set[str] = set()
    for field in dataclasses.fields(cls):
        names.add(prefix + field.name)
        if dataclasses.is_dataclass(field.type):
            names |= fields(field.type, f"{prefix}{field.name}.")  # type: ignore[arg-type]
    return names


@pytest.mark.parametrize("name", [*GUIDES, "CONTRIBUTING.md", "CHANGELOG.md", "eval/README.md"])
def test_every_field_of_a_recipe_that_is_named_exists(name: str):
    asked = re.findall(r"`(?:--)?((?:policy|data|optim|train|eval)\.[a-z_]+)", text_of(name))
    files = re.compile(r"\.(toml|json|jsonl|py|md)$")
    assert {field for field in asked if not files.search(field)} - fields(Recipe) == set()


@pytest.mark.parametrize("name", GUIDES)
def test_every_toml_block_is_toml(name: str):
    for block in blocks(name, "toml"):
        tomllib.loads(block)


PUBLISHED = re.compile(r"authors'|LeRobot|openpi|the same file")  # whose settings [optim] repeats
OPTIMISER = {"lr", "warmup_steps", "final_lr", "beta2", "weight_decay", "clip_norm"}


def published() -> dict[str, str]:
    """The [optim] tables that say in their first two lines whose settings they are, by place."""
    texts = {f"{name}, block {n}": text for name in GUIDES for n, text in enumerate(blocks(name, "toml"))}
    texts |= {f"configs/{path.name}": path.read_text() for path in (ROOT / "configs").glob("*.toml")}
    tables = {name: text.partition("\n[optim]")[2].partition("\n[")[0] for name, text in texts.items()}
    return {n: f"[optim]{t}" for n, t in tables.items() if PUBLISHED.search("".join(t.splitlines()[:2]))}


@pytest.mark.parametrize("where", published())
def test_settings_of_others_are_written_in_full_because_a_default_would_replace_one(where: str):
    assert set(tomllib.loads(published()[where])["optim"]) >= OPTIMISER


def test_the_recipes_of_openvla_have_the_schedule_and_the_clipping_of_its_authors():
    plain, oft = (tomllib.loads(t)["optim"] for n, t in published().items() if "openvla.md" in n)
    steps = range(0, 150_000, 10_000)
    rates = [
        [optim.lr * schedule(step, 150_000, optim) for step in steps]
        for optim in (OptimRecipe(**plain), OptimRecipe(**oft))
    ]
    assert rates[0] == [5e-4] * 15  # openvla: AdamW without a schedule
    assert rates[1] == pytest.approx([5e-4] * 10 + [5e-5] * 5)  # OFT: MultiStepLR, 100,000 steps, 0.1
    assert plain["clip_norm"] == oft["clip_norm"] == 0.0


def test_the_readers_card_recipe_and_strategy_are_valid(readers_folder):
    assert load_card("my-robot-card.toml").name == "my-robot"
    assert load_strategy("my-strategy.toml").rules


def test_the_three_steps_of_the_readme_train_a_policy(readers_folder: Path, capsys):
    rng = np.random.default_rng(0)
    (readers_folder / "my-robot").mkdir()
    with h5py.File(readers_folder / "my-robot" / "cup_demo.hdf5", "w") as file:
        for number in range(4):
            demo = file.create_group(f"data/demo_{number}")
            demo["obs/front_rgb"] = rng.integers(0, 256, (3, 224, 224, 3), np.uint8)
            demo["obs/joint_positions"] = rng.normal(size=(3, 7))
            demo["actions"] = rng.normal(size=(3, 7))
    stand_in = ROOT / "tests" / "fixtures" / "lerobot_smolvla"  # for lerobot/pi0_base
    shutil.copytree(stand_in, readers_folder / "base")
    shutil.rmtree(readers_folder / "base" / "tokenizer")
    sentences = [f"number {n} and {n * n}" for n in range(400)]
    train_word_tokenizer(sentences, 500).save(readers_folder / "paligemma")  # the embedding has 512 rows
    text = (readers_folder / "my-robot.toml").read_text()
    slots = 'base_0_rgb = "front", left_wrist_0_rgb = "", right_wrist_0_rgb = ""'  # those of pi0_base
    assert slots in text
    own_slots = text.replace(slots, 'cam_high = "front", cam_wrist = ""')
    (readers_folder / "my-robot.toml").write_text(own_slots)
    for path in (readers_folder / "base").glob("policy_*.safetensors"):  # a base model has none of one robot
        save_file({f"so100.buffer.{name}": tensor for name, tensor in load_file(path).items()}, path)
    changed = ["--policy.checkpoint", "base", "--train.steps", "2", "--train.batch_size", "2"]
    changed += ["--train.validation_batches", "1"]
    assert cli.main(["train", "my-robot.toml", *changed, "--policy.tokenizer", "", "--out", "no"]) == 2
    assert "policy.tokenizer" in capsys.readouterr().err  # rather than a new tokenizer for pretrained weights
    assert cli.main(["train", "my-robot.toml", *changed]) == 0
    assert (readers_folder / "runs" / "my-robot" / "report.html").is_file()
    made = cli.main(["export", "runs/my-robot", "--to", "vlafit", "--out", "exported"])
    assert made == 0 and "exported" in capsys.readouterr().out


PYTHON = [
    (name, number)
    for name in GUIDES
    if name != "docs/extending.md"  # its blocks are files of a package, which tests/outside runs
    for number in range(len(blocks(name, "python")))
]


@pytest.mark.sim
@pytest.mark.parametrize(("name", "number"), PYTHON)
def test_python_in_the_guides_runs(name: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("metaworld")
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks(name, "python")[number], f"{name}, block {number}", "exec"), {})


# ------------------------------------------------------------------------------------- size and numbers


def test_the_readme_is_short():
    assert len(text_of("README.md").split()) < 900


# nobody reads these from top to bottom
LOOKED_UP = ("docs/extending.md", "docs/gpus.md", "docs/layouts.md", "docs/troubleshooting.md")


@pytest.mark.parametrize("name", [page for page in PAGES if page not in LOOKED_UP])
def test_a_page_is_short(name: str):
    assert len(text_of(name).split()) <= 900


@pytest.mark.parametrize("name", ["docs/your_robot.md", "docs/serving.md", "docs/serving_operation.md"])
def test_a_page_that_is_read_beside_a_robot_has_lines_that_fit_a_terminal(name: str) -> None:
    prose = re.sub(r"^```.*?^```|^(\||!\[).*?$", "", text_of(name), flags=re.DOTALL | re.MULTILINE)
    assert max(map(len, prose.splitlines())) <= 120


def test_every_shipped_strategy_is_in_the_changelog_and_every_protocol_on_its_page():
    assert [n for n in shipped.names("strategy") if f"`{n}`" not in text_of("CHANGELOG.md")] == []
    pages = text_of("docs/evaluation.md") + text_of("docs/libero.md")
    named = re.findall(r"`(\w[\w*-]+)`", pages)  # or by a pattern: libero-*-task-openpi
    assert [n for n in shipped.names("protocol") if not any(fnmatchcase(n, p) for p in named)] == []


def facts(*parts: str) -> dict[str, Any]:
    return json.loads(RESULTS.joinpath(*parts).read_text(encoding="utf-8"))


def test_the_published_quickstart_is_what_its_reports_say():
    text = text_of("eval/README.md")
    for seed, folder in enumerate(
        ("quickstart", "quickstart-seeds/quickstart-seed1", "quickstart-seeds/quickstart-seed2")
    ):
        success = facts(folder, "report.json")["success"]
        cells = " | ".join(
            f"{success[when]['successes']} of {success[when]['episodes']}"
            for when in ("before", "after", "wrong_instruction")
        )
        assert f"| {seed} | {cells} |" in text


def test_the_published_comparison_is_what_its_record_says():
    text = text_of("eval/README.md")
    for row in facts("compare", "compare.json")["strategies"]:
        seeds = row["success"]["after"]["seeds"].values()
        total = f"{sum(s['successes'] for s in seeds)} of {sum(s['episodes'] for s in seeds)}"
        assert f"| {row['strategy']} | {total} |" in text


def test_the_memory_table_is_what_the_forecast_says():
    from vlafit.policies import build_family
    from vlafit.train.forecast import Workload, forecast

    policy = build_family("smolvla", "smolvla", device="meta")  # the smallest of its policies
    made = forecast(policy, load_strategy("expert"), Workload(1)).total / 1e9
    assert f"| smolvla, expert | {made:.1f}/" in text_of("docs/hardware.md")
