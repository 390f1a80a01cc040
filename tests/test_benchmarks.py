"""The benchmarks of training and acting on the CPU, with tiny policies: they measure the product's path."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks import act, beside_lerobot, full_size, gpu, rows, traffic, train
from benchmarks.gpu_figures import FIGURES, FORECASTS, Figure
from tests.waiting import wait_until
from vlafit.policies import build_family
from vlafit.train.batch_shape import BatchShape

POINT = {
    "size": "pi0-tiny", "strategy": "expert", "shape": "libero", "batch": 2, "recompute": "full",
    "states": "fp32", "copies": "pinned", "micro_batches": 2, "ema": 0.9, "set": ["train.draws=2"],
    "limit": 0.0, "steps": 2, "warm_up": 1, "device": "cpu", "commit": "abc", "profile": "",
}  # fmt: skip


def test_a_row_of_training_holds_what_the_loop_did_beside_what_is_counted(tmp_path: Path):
    point = POINT | {"profile": str(tmp_path / "table.txt")}
    values = rows.Row()
    for some in train.measure(point):
        values |= some
    assert values["card"] == "cpu" and values["commit"] == "abc" and values["precision"] == "fp32"
    assert 0 < values["trainable"] < values["parameters"]  # the strategy was applied
    assert values["samples_per_s_low"] <= values["samples_per_s"] <= values["samples_per_s_high"]
    assert values["memory_parts_gb"].keys() >= {"weights", "gradients", "optimiser", "average"}
    assert values["varlen"] == 0 and values["fp32_product_error"] < 512**0.5 * 2**-23  # sums of 512 products
    assert "aten::" in (tmp_path / "table.txt").read_text()
    counts = train.counted(point)
    row = train.compared(values | {"card": "a GPU", "peak_tflops": 1.0}, counts)
    assert row["forecast_error"] == pytest.approx(counts["forecast_gb"] / values["peak_gb"] - 1)
    assert row["mfu"] == pytest.approx(values["samples_per_s"] * counts["tflop"])


def test_the_libero_shape_is_trimmed_to_two_cameras_and_a_third_of_the_prompt():
    needs = build_family("pi0", "pi0", device="meta").needs()
    padded, libero = (train.host_batch(needs, shape, 2, 0).trim() for shape in ("padded", "libero"))
    assert (BatchShape.of(padded), BatchShape.of(libero)) == (BatchShape(2, 3, 48), BatchShape(2, 2, 16))


@pytest.mark.slow
def test_the_mixed_shape_is_counted_without_its_padding():
    mixed = POINT | {"strategy": "full", "shape": "mixed", "batch": 4, "micro_batches": 1}
    packed, padded = (mixed | {"set": [f"train.packing={how}"]} for how in ("rows", "none"))
    short, long, whole = (
        train.counted(point)["tflop"] for point in (packed, padded, padded | {"shape": "padded"})
    )
    assert long == whole  # padded to the longest row
    assert short < 0.95 * long  # half of the rows have 4 of 12 patches


def test_a_step_has_its_micro_batches_and_no_key_comes_twice():
    needs = build_family("pi0", "pi0-tiny", device="meta").needs()
    steps = train.host_batches(needs, "padded", 4, 2, torch.device("cpu"))
    three = [next(steps) for _ in range(3)]
    assert [[len(batch) for _, batch in step] for step in three] == [[2, 2]] * 3
    keys = [key for step in three for keys, _ in step for key in keys]
    assert len(set(keys)) == len(keys) == 12


def test_a_point_sets_the_recipe_of_the_product():
    recipe = train.recipe_of(POINT | {"set": ["train.draws=2", "optim.states=8bit"]}, bf16=True)
    assert (recipe.train.draws, recipe.optim.states, recipe.optim.ema) == (2, "8bit", 0.9)
    assert (recipe.train.precision, recipe.train.frozen, recipe.train.recompute) == ("bf16", "bf16", "full")


def test_a_row_of_acting_holds_percentiles_of_the_actor_and_its_parts():
    point = {"size": "pi0-tiny", "dtype": "bfloat16", "mode": "eager", "steps": 2, "calls": 3, "warm_up": 1,
             "device": "cpu", "commit": "abc", "profile": ""}  # fmt: skip
    values = rows.Row()
    for some in act.measure(point):
        values |= some
    dtypes = {p.dtype for p in act.actor_of(point).policy.parameters()}
    assert dtypes == {torch.bfloat16, torch.float32}  # norms and projections stay as `load_actor` keeps them
    assert 0 < values["p50_ms"] <= values["p90_ms"] <= values["p99_ms"]
    assert min(values["sample_ms"], values["codec_ms"], values["prefix_ms"], values["suffix_step_ms"]) > 0


def test_a_process_that_fails_becomes_a_row_with_its_error_and_what_it_measured_before(
    capsys: pytest.CaptureFixture[str],
):
    def values():
        yield {"card": "a GPU"}
        raise MemoryError("tried to allocate 2.00 GiB")

    assert rows.print_values(values()) == 1
    done = subprocess.CompletedProcess([], 1, stdout=capsys.readouterr().out, stderr="")
    assert rows.outcome(done) == {"card": "a GPU", "error": "MemoryError: tried to allocate 2.00 GiB"}
    killed = subprocess.CompletedProcess([], -9, stdout='{"card": "a GPU"}\n', stderr="")
    assert rows.outcome(killed) == {"card": "a GPU", "error": "exit status -9: "}


def test_rows_are_written_one_by_one_and_none_begins_after_the_budget(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "new" / "rows.jsonl"
    for number in (1, 2):
        rows.write({"row": number}, out)
    assert [json.loads(line) for line in out.read_text().splitlines()] == [{"row": 1}, {"row": 2}]
    assert list(rows.measured_rows("train", [POINT, POINT], Namespace(budget=1e-9, row_limit=60.0))) == []
    assert "last 2 rows are not measured" in capsys.readouterr().out


def test_each_combination_of_the_options_is_a_point_and_has_its_own_profile(tmp_path: Path):
    options = Namespace(
        sizes=["pi0"], strategies=["full", "lora"], shapes=["padded", "libero"], recompute=["none"],
        states=["fp32"], copies=["pinned"], batch=[8, 16], micro_batches=1, ema=0.0, set=[],
        limit=0.0, steps=1, warm_up=1, device="cuda", commit="", profile=True, out=tmp_path / "rows.jsonl",
    )  # fmt: skip
    points = train.points_of(options)
    assert len({(p["strategy"], p["shape"], p["batch"]) for p in points}) == len(points) == 8
    assert len({p["profile"] for p in points}) == 8
    assert all(Path(p["profile"]).parent == tmp_path for p in points)


PLANNED = Namespace(tiny=True, device="cpu", out=Path(), commit="abc", row_limit=60.0)


def test_the_figures_of_a_gpu_are_rows_of_the_benchmarks(tmp_path: Path):
    """Each is one row, no two are the same, and what was measured is not measured again."""
    figures = [*FIGURES, *FORECASTS]
    planned = [gpu.planned(figure, PLANNED, 80e9) for figure in figures]
    assert [one.refused for one in planned] == [""] * len(figures)
    points = [one.point for one in planned if one.point is not None]
    assert len({gpu.key(point) for point in points}) == len(figures) == len(points)
    facts = {"card": "NVIDIA H200", "commit": "abc", "torch": "2", "date": "today"}
    good = points[0] | facts | {"samples_per_s": 51.0}
    for row in (good, points[1] | facts | {"error": "out of memory"}, points[2] | facts | {"card": "cpu"}):
        rows.write(row, tmp_path / "train.jsonl")
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"size": "pi0", "stra')  # a run that was killed while it wrote
    done = {gpu.key(row): row for row in gpu.measured_before(tmp_path, facts)}
    assert list(done) == [gpu.key(points[0])]
    text = gpu.page(planned[:3], figures, done, facts)
    (line,) = [line for line in text.splitlines() if line.startswith("| pi0")]
    assert "samples_per_s >= 50 on H200 | yes |" in line
    assert text.count("not measured yet") == len(figures) - 1
    (aim,) = FIGURES[0].aims
    assert aim.met(good | {"samples_per_s": 49.0}) == "no"
    assert aim.met(good | {"card": "NVIDIA H100"}) == ""


def test_a_row_of_a_gpu_that_fails_ends_no_other(tmp_path: Path):
    """One cannot be planned, and two take too long: each has its error in the page, and is tried again."""
    figures = (
        Figure("unknown", "train", "--sizes pi9"),
        Figure("late", "act", "--sizes pi0 --modes eager"),
        Figure("last", "act", "--sizes pi0 --modes graph"),
    )
    options = Namespace(**vars(PLANNED) | {"out": tmp_path, "budget": 0.0, "row_limit": 0.01})
    plan = [gpu.planned(figure, options, 80e9) for figure in figures]
    done: dict[str, rows.Row] = {}
    assert list(gpu.measured(plan, done, options)) == plan
    facts = rows.machine(torch.device("cpu"), "abc")
    text = gpu.page(plan, figures, done, facts)
    assert "- unknown: cannot be planned: SystemExit" in text
    assert text.count("took more than 0.01 s and was ended") == 2
    assert len((tmp_path / "act.jsonl").read_text().splitlines()) == 2
    assert list(gpu.measured_before(tmp_path, facts)) == []


def test_the_table_of_what_gpus_reached_is_made_of_the_rows():
    page = gpu.DOCUMENT.read_text(encoding="utf-8")
    table = gpu.aims_table(list(gpu.rows_in(Path("benchmarks/results/gpu"))))
    assert f"{gpu.BEGIN}{table}{gpu.END}" in page
    assert f"{beside_lerobot.BEGIN}{beside_lerobot.document_table()}{beside_lerobot.END}" in page
    reached = {line.split(" | ")[0] for line in table.splitlines()}
    assert {"| pi0 full", "| pi0 expert", "| pi0 acts, CUDA graph"} <= reached


def test_the_newest_row_of_a_card_is_its_figure_and_no_aim_counts_on_another_card(tmp_path: Path):
    point = train.points_of(train.parser().parse_args(FIGURES[0].words.split()))[0]
    written = [
        point | {"card": card, "date": date, "samples_per_s": speed, "batch": batch}
        for card, date, speed, batch in (
            ("NVIDIA H200", "2026-12-02 10:00", 52.0, 24),
            ("NVIDIA H200", "2026-12-01 10:00", 48.0, 16),
            ("NVIDIA L40S", "2026-12-03 10:00", 9.0, 4),
        )
    ]
    (line,) = [row for row in gpu.aims_table(written).splitlines() if row.startswith("| pi0 full |")]
    assert line == "| pi0 full | samples_per_s >= 50 on H200 | 52 (H200, 2026-12-02) | yes |"
    document = tmp_path / "page.md"
    document.write_text(f"before\n{gpu.BEGIN}old\n{gpu.END}after\n")
    gpu.write_document(written, document)
    assert document.read_text() == f"before\n{gpu.BEGIN}{gpu.aims_table(written)}{gpu.END}after\n"


def test_traffic_is_what_operations_read_and_write_and_views_are_none():
    a, b = torch.zeros(4, 8), torch.zeros(8, 2)
    with traffic.Traffic() as seen:
        product = a @ b
        assert product.t().unflatten(0, (1, 2)).shape == (1, 2, 4)
    assert (seen.kernels, seen.bytes) == (1, 4 * (4 * 8 + 8 * 2 + 4 * 2))
    with traffic.Traffic() as seen:
        product.add_(torch.zeros(1, 1).expand(4, 2)[:1])  # of the expanded one number is read
    assert (seen.kernels, seen.bytes) == (2, 4 * (1 + 8 + 8 + 1))  # zeros, and the sum in place


def test_a_samples_traffic_is_told_from_that_of_a_step():
    (point,) = train.points_of(
        train.parser().parse_args(["--sizes", "pi0-tiny", "--strategies", "lora", "--shapes", "padded"])
    )
    got = traffic.counted(point)
    assert got["kernels"] > 500 and got["sample_gb"] > 0 and got["step_gb"] > 0
    config = build_family("pi0", "pi0-tiny", device="meta").config
    # All images and words are real: only the suffix has a mask. The prefix's last layer is not needed.
    assert got["attention"] == config.vision.depth + 2 * config.language.depth - 1
    assert got["masked"] == config.language.depth


def test_pages_that_a_forked_child_shares_are_counted_once():
    """A command that starts another program has a copy of itself for a moment, without pages of its own."""
    script = (
        "import os, sys, time\n"
        "held = bytearray(b'1') * 200_000_000\n"
        "child = os.fork()\n"
        "if child == 0: time.sleep(60); os._exit(0)\n"
        "print(len(held), flush=True); sys.stdin.read(); os.kill(child, 9)\n"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline()
        anonymous, everything = full_size.resident(psutil.Process(parent.pid))
        parent.communicate()
    assert 2e8 <= anonymous <= everything < 4e8


def test_a_command_that_has_just_ended_holds_nothing():
    with subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read()  # until the end; it is not waited for yet
        own = psutil.Process(process.pid)
        wait_until(lambda: own.status() == psutil.STATUS_ZOMBIE)
        assert full_size.resident(own)[0] == 0
