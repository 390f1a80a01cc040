"""Whatever the machine or a file does to a command, it ends in one sentence, and a long run goes on."""

import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vlafit import config, files, load_actor
from vlafit.checkpoints import inspect, load, tensor_files
from vlafit.checkpoints.formats.native.write import write_folder
from vlafit.checkpoints.tensor_files import read_json_object
from vlafit.cli import VERBS, main
from vlafit.cli.console import surviving_streams
from vlafit.cli.places import checkpoint_folder, checkpoint_stays
from vlafit.codec import fast, tokenizer, train_word_tokenizer
from vlafit.datasets import load_card
from vlafit.errors import ConfigError, VlafitError, WeightsError, brief, command_line
from vlafit.policies import build_family, families, family, override
from vlafit.recipe import Recipe
from vlafit.rollout.protocol import load_protocol
from vlafit.tuning.plan import Plan

FIXTURES = Path(__file__).parents[1] / "fixtures"
NESTED = "[" * 100_000


class Broken(io.StringIO):
    """A pipe whose reader is gone."""

    def write(self, _: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.case(
    section="machines",
    report="`RecursionError`, `MemoryError`, `File name too long`",
    user_has="nested JSON, absurd sizes, long names",
    now="one sentence",
)
def test_json_nested_too_deeply_is_one_sentence_everywhere(tmp_path: Path):
    with pytest.raises(ValueError, match="nested too deeply"):
        files.parse_json(NESTED)
    (tmp_path / "config.json").write_text(NESTED)
    with pytest.raises(WeightsError, match="config.json.*nested too deeply"):
        read_json_object(tmp_path / "config.json")
    (tmp_path / "m.jsonl").write_text(NESTED + "\n")
    with pytest.raises(VlafitError, match="line 1.*nested too deeply"):
        files.read_json_lines(tmp_path / "m.jsonl")


@pytest.mark.parametrize("value", ["[1]", '"text"', "7", "null"])
def test_json_that_is_no_object_is_named_as_what_it_is(value: str, tmp_path: Path):
    kind = type(files.parse_json(value)).__name__
    words = train_word_tokenizer(["reach out"], 300)
    words.save(tmp_path / "words")
    (tmp_path / "words" / "tokenizer_config.json").write_text(value)
    (tmp_path / "words.json").write_text(value)
    for name in (fast.FILE, fast.CONFIG):
        (tmp_path / "fast").mkdir(exist_ok=True)
        (tmp_path / "fast" / name).write_text(value)
    (tmp_path / "model.safetensors.index.json").write_text(value)
    for read in (
        lambda: tokenizer.load(tmp_path / "words"),
        lambda: tokenizer.load(tmp_path / "words.json"),
        lambda: fast.load(tmp_path / "fast"),
        lambda: tensor_files.weight_files(tmp_path),
        lambda: Plan.from_json(value),
    ):
        with pytest.raises(VlafitError, match=f"it holds no JSON object but {kind}"):
            read()


def test_every_json_file_is_read_by_the_reader_that_survives_deep_nesting():
    package = Path(files.__file__).parent
    own = {"files.py", "sweep/storage.py", "compare/identity.py", "checkpoints/load_report.py",
           "rollout/protocol.py", "checkpoints/formats/peft/adapter_config.py",
           "checkpoints/formats/lerobot/write_processors.py", "record/recording_folder.py",
           "tuning/plan.py", "cli/verbs/inspect.py", "rollout/against.py"}  # fmt: skip
    direct = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if "json.loads(" in path.read_text()
    }
    assert direct <= own, "these read JSON that vlafit has not just written itself"


def test_durations_are_measured_by_a_clock_that_never_jumps():
    package = Path(files.__file__).parent
    reads_the_date = {
        "serve/metadata.py",
        "serve/server.py",
        "train/feature_storage.py",
    }  # stamps, age of a file
    direct = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if "time.time()" in path.read_text()
    }
    assert direct == reads_the_date, "measure by time.monotonic or perf_counter"


def test_toml_nested_too_deeply_is_one_sentence(tmp_path: Path):
    (tmp_path / "r.toml").write_text(f"x = {NESTED}")
    with pytest.raises(ConfigError, match="r.toml.*nested too deeply"):
        config.read(Recipe, tmp_path / "r.toml", "recipe")


@pytest.mark.case(
    section="machines",
    report="`hz = inf`, `log_every = 1e30` accepted",
    user_has="a slip in a TOML file",
    now="refused by the key's name",
)
@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e30", str(10**30)])
@pytest.mark.parametrize("key", ["train.log_every", "train.max_seconds", "optim.lr", "train.steps"])
def test_numbers_without_bounds_are_refused_by_name(tmp_path: Path, key: str, value: str):
    section, name = key.split(".")
    (tmp_path / "r.toml").write_text(f"[{section}]\n{name} = {value}\n")
    with pytest.raises(ConfigError) as caught:
        config.read(Recipe, tmp_path / "r.toml", "recipe")
    assert key in str(caught.value)


def sizes(family: str, config: Any, prefix: str = "") -> Iterator[tuple[str, str, int]]:
    """Yield the sizes of a family's config: its fields of whole numbers, by dotted key."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from sizes(family, value, f"{prefix}{field.name}.")
        elif type(value) is int:
            yield family, f"{prefix}{field.name}", 10**9


EVERY = [
    row
    for name in families()
    for row in sizes(name, next(iter(family(name).SIZES.values())))
    # No size but every how many layers; and only of pi0.5 and of OpenVLA, which are not the first.
    if row[1] != "expert.self_every"
    and row[:2] not in (("pi0", "action_tokens"), ("openvla", "answer_tokens"))
]


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        *EVERY,
        ("act", "resnet_blocks", [1] * 10**6),
        ("act", "resnet_blocks", [10**7, 1, 1, 1]),
        ("act", "resnet_blocks", [600, 600]),
    ],
)
def test_a_policy_of_absurd_size_is_refused_before_it_is_built(name: str, key: str, value: Any):
    with pytest.raises(ConfigError) as caught:
        override(next(iter(family(name).SIZES.values())), {key: value}, "here")
    message = str(caught.value)
    assert key.rpartition(".")[2] in message and len(message) < 300
    assert re.search(r"at most \d+|no multiple|not a multiple", message), message


def test_a_checkpoint_of_absurd_size_is_refused_before_memory_is_taken(tmp_path: Path):
    policy = build_family("act", "act-tiny", device="cpu")
    (tmp_path / "c").mkdir()
    write_folder(tmp_path / "c", policy, dict(policy.named_parameters()), None)
    path, manifest = tmp_path / "c" / "policy.json", tmp_path / "c" / "manifest.json"
    facts, listed = json.loads(path.read_text()), json.loads(manifest.read_text())
    path.write_text(json.dumps(facts | {"config": facts["config"] | {"resnet_width": 10**9}}))
    listed["files"]["policy.json"] = files.sha256(path)
    manifest.write_text(json.dumps(listed))
    with pytest.raises(
        ConfigError, match=rf"{path}: config.*policy config: resnet_width 1000000000 .*at most"
    ):
        inspect(tmp_path / "c")


@pytest.mark.parametrize(
    ("fixture", "file", "key", "value"),
    [
        ("lerobot_smolvla", "config.json", "chunk_size", 10**9),
        ("lerobot_smolvla", "config.json", "tokenizer_max_length", 10**9),
        ("lerobot_smolvla", "config.json", "num_steps", 10**9),
        ("lerobot_smolvla", "config.json", "resize_imgs_with_padding", [10**6, 10**6]),
        ("openpi_pi0", "config.json", "action_horizon", 10**9),
    ],
)
def test_a_foreign_config_of_absurd_size_is_refused_before_memory_is_taken(
    fixture: str, file: str, key: str, value: Any, tmp_path: Path
):
    folder = Path(shutil.copytree(FIXTURES / fixture, tmp_path / "c"))
    path = folder / file
    if fixture == "openpi_pi0":
        shutil.copy(folder / "openpi_config.json", path)
    facts = json.loads(path.read_text())
    assert key in facts
    path.write_text(json.dumps(facts | {key: value}))
    given = {"vision.heads": 2} if fixture == "openpi_pi0" else None
    for look in (inspect, load):
        with pytest.raises(VlafitError) as caught:
            look(folder, config=given)
        largest = value[0] if isinstance(value, list) else value
        assert str(largest) in str(caught.value) and re.search("at most|in 1 to", str(caught.value))


def test_a_message_quotes_no_more_of_a_file_than_a_person_reads():
    assert len(brief(KeyError("x" * 10**6))) < 400 and "\x1b" not in brief(ValueError("\x1b[31m"))
    long = str(VlafitError(f"file: key is {'x' * 10**6}; correct it\nsecond line"))
    assert len(long) < 4100 and long.startswith("file: key") and long.endswith("correct it\nsecond line")
    assert str(VlafitError("short")) == "short"


def test_a_checkpoint_that_its_run_deletes_while_it_is_read_is_one_sentence(tmp_path: Path):
    folder = tmp_path / "checkpoints" / "step_000001"
    folder.mkdir(parents=True)
    with pytest.raises(WeightsError, match="damaged"), checkpoint_stays(folder):
        raise WeightsError("damaged")
    with (
        pytest.raises(ConfigError, match=r"step_000001: its run deleted .*train\.keep"),
        checkpoint_stays(folder),
    ):
        folder.rmdir()
        (folder / "policy.json").read_text()
    with pytest.raises(WeightsError, match="damaged"), checkpoint_stays(Path("org/name@1234")):
        raise WeightsError("damaged")


@pytest.mark.parametrize("name", ["missing", "missing.safetensors"])
def test_a_checkpoint_that_is_not_there_is_one_error(name: str):
    for find in (load_actor, load, lambda text: checkpoint_folder(text, foreign=True)):
        with pytest.raises(VlafitError, match=f"there is no checkpoint {name!r}") as error:
            find(name)
        assert error.value.__context__ is None and error.value.__cause__ is None


def test_an_out_folder_with_too_long_a_name_is_one_sentence(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "quickstart", "--out", "x" * 300]) == 2
    error = capsys.readouterr().err
    assert "File name too long" in error and "Traceback" not in error and len(error) < 600


def test_output_that_nobody_reads_does_not_end_a_long_command(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Broken())
    with surviving_streams(True):
        print("step 1", flush=True)
        print("step 2", flush=True)
    with pytest.raises(BrokenPipeError), surviving_streams(False):
        print("x", flush=True)


def test_a_process_started_without_standard_output_prints_into_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with surviving_streams(False):
        print("x", flush=True)
        assert not sys.stdout.isatty()


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the latter is the locale C's
def test_text_that_the_terminal_cannot_show_is_escaped(monkeypatch, errors: str):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", errors=errors))
    with surviving_streams(False):
        print("runs/é → 1", flush=True)
    assert raw.getvalue() == b"runs/\\xe9 \\u2192 1\n"


@pytest.mark.parametrize("survive", [True, False])
def test_control_characters_are_escaped_and_line_breaks_are_not(monkeypatch, survive):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="utf-8"))
    with surviving_streams(survive):
        print("\x1b[2Jclean\x07 \x9b31m a\u202eb\té", flush=True)
    assert raw.getvalue().decode() == "\\x1b[2Jclean\\x07 \\x9b31m a\\u202eb\té\n"


def test_a_command_that_is_printed_can_be_pasted_whatever_a_path_holds():
    words = ["train", "runs/a b;rm -rf $HOME", "--out", "<b>'x'"]
    assert shlex.split(command_line(*words)) == ["vlafit", *words]
    package, verb = Path(files.__file__).parent, rf"vlafit ({'|'.join(VERBS)}) [^\"'\n]*(\{{|%[sr])"
    own = (
        "{folder} --to",
        "data {verb}",
        "inspect {other} --size",
        "data VERB",
        "has no verb",
    )  # words of vlafit's own
    bare = [
        line.strip()
        for path in package.rglob("*.py")
        for line in path.read_text().splitlines()
        if re.search(verb, line) and not any(part in line for part in own)
    ]
    assert not bare, "these print a command whose path a shell might read otherwise: use command_line"


def test_an_error_that_names_a_control_character_shows_it_as_an_escape(capsys):
    assert main(["inspect", "no\x1b[2Jsuch"]) == 2
    error = capsys.readouterr().err
    assert "no\\x1b[2Jsuch" in error and "\x1b" not in error


def test_a_path_that_the_locale_cannot_decode_is_written_as_its_bytes(tmp_path: Path):
    path = os.fsencode("runs/é").decode("ascii", "surrogateescape")  # as LANG=C decodes it
    files.write_atomic(tmp_path / "a.txt", path)
    files.append_line(tmp_path / "b.txt", path)
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "runs/é"
    assert (tmp_path / "b.txt").read_text(encoding="utf-8") == "runs/é\n"


def test_replanning_after_the_end_of_an_episode_is_refused(tmp_path: Path):
    (tmp_path / "p.toml").write_text('base = "pusht"\nreplan = 1000000000\n')
    with pytest.raises(ConfigError, match="replan.*1000000000"):
        load_protocol(tmp_path / "p.toml")


CARDS = [
    ("hz = 10.0", "hz = inf", "hz"),
    ("hz = 10.0", "hz = 1e9", "hz"),
    ('name = "front"', 'name = "fr\\nont"', r"fr\nont"),
]


@pytest.mark.parametrize(("old", "new", "fact"), CARDS)
def test_a_card_with_a_rate_or_a_name_that_no_robot_has_is_refused(
    tmp_path: Path, old: str, new: str, fact: str
):
    from tests.train.world import CARD

    (tmp_path / "c.toml").write_text(CARD.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        load_card(tmp_path / "c.toml")
    assert fact in str(caught.value)
