"""What the benchmarks of training and acting share: a fresh process for each row, and policies of any size.

A row is a dictionary. Its point says what is measured and goes to the process as JSON; the process prints
what it measured. A process that fails, such as for want of memory, gives a row with its error.
"""

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from vlafit.nn.policy import Policy
from vlafit.policies import build_family, families, family

Row = dict[str, Any]

LAUNCHES = {
    "cudaLaunchKernel",
    "cudaLaunchKernelExC",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cudaGraphLaunch",
}
COPIES = ("Memcpy", "Memset")
ATTENTION = {"flash": "flash_", "masked": "fmha", "cudnn": "sdpa"}  # in the names of torch's kernels
SHOWN = 25  # operations in a profile's table
LONGEST_ERROR = 400


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the options that every benchmark of rows has."""
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget", type=float, default=0.0, help="seconds after which no row is begun")
    parser.add_argument("--row-limit", type=float, default=900.0, help="seconds that a row may take [900]")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--commit", default="", help="of the code, where its folder is no repository")
    parser.add_argument("--out", type=Path, help="file of JSON lines, to which each row is added at once")
    parser.add_argument("--one", type=json.loads, metavar="POINT", help=argparse.SUPPRESS)


def sizes() -> dict[str, str]:
    """Return the sizes of the families that sample actions by flow matching: size -> family."""
    return {size: name for name in families() if name != "act" for size in family(name).SIZES}


def random_policy(size: str, device: torch.device) -> Policy:
    """Build a policy with random float32 weights, drawn on `device` itself: billions on a CPU take minutes.

    Matrices that a fresh policy starts at zero (adaptive norms) are drawn too, as trained ones are not zero.
    """
    generator = torch.Generator(device).manual_seed(0)
    with torch.device(device):
        policy = build_family(sizes()[size], size, generator=generator, device=str(device))
    with torch.no_grad():
        for info in policy.parts():
            parameter = policy.get_parameter(info.name)
            if info.kind == "norm" and parameter.ndim == 2:
                parameter.normal_(0.0, 0.1 * parameter.shape[1] ** -0.5, generator=generator)
    return policy


def machine(device: torch.device, commit: str) -> Row:
    """Return the facts of machine and code that a row is dated with."""
    return {
        "card": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "commit": commit or commit_here(),
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M}",
    }


def commit_here() -> str:
    """Return the commit of the code, with a + where files differ from it; empty outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def measured_rows(module: str, points: Sequence[Row], options: argparse.Namespace) -> Iterator[Row]:
    """Measure each point in a process of its own that runs `benchmarks.MODULE --one POINT`.

    Starts none after `options.budget` seconds (0: no limit), and says how many are left out. A process that
    takes longer than `options.row_limit` is ended; its row has an error.
    """
    began = time.perf_counter()
    for number, point in enumerate(points):
        if options.budget and time.perf_counter() - began > options.budget:
            print(f"--budget is spent: the last {len(points) - number} rows are not measured", flush=True)
            return
        command = [sys.executable, "-m", f"benchmarks.{module}", "--one", json.dumps(point)]
        # Where the profile was written says something of the machine; its name is enough.
        named = {"profile": Path(point["profile"]).name} if point["profile"] else {}
        yield point | named | _row_of(command, options.row_limit)


def _row_of(command: Sequence[str], limit: float) -> Row:
    try:
        return outcome(subprocess.run(command, capture_output=True, text=True, timeout=limit))
    except subprocess.TimeoutExpired as late:
        printed = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        ended = subprocess.CompletedProcess(command, 1, printed, f"took more than {limit:g} s and was ended")
        return outcome(ended)


def write(row: Mapping[str, object], out: Path | None) -> None:
    """Print a row, and add it to a file of JSON lines."""
    line = json.dumps(row)
    print(line, flush=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file:
            file.write(f"{line}\n")


def print_values(values: Iterable[Row]) -> int:
    """Print what is measured as it comes, for `outcome` to read; an exception becomes the row's error."""
    try:
        for some in values:
            print(json.dumps(some), flush=True)
    except Exception as error:  # of any kind, such as torch's for want of memory: the other rows go on
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}"
        print(json.dumps({"error": text[:LONGEST_ERROR]}), flush=True)
        return 1
    return 0


def outcome(done: subprocess.CompletedProcess[str]) -> Row:
    """Return the values that a process printed; a failed one keeps what it measured before its error."""
    row: Row = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            row |= json.loads(line)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [""]
        row.setdefault("error", f"exit status {done.returncode}: {last[0]}"[:LONGEST_ERROR])
    return row


def profiler(device: torch.device) -> profile:
    """Return a profiler of CPU and GPU, not started."""
    gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    return profile(activities=[ProfilerActivity.CPU, *gpu])


def profiled(measured: profile, device: torch.device, table: Path | None) -> Row:
    """Return kernels, launches and the device's busy milliseconds; write the table of operations."""
    if table is not None:
        table.parent.mkdir(parents=True, exist_ok=True)
        order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        means = measured.key_averages()
        table.write_text(means.table(sort_by=order, row_limit=SHOWN, max_name_column_width=90))
    if device.type != "cuda":
        return {}
    events = measured.events() or []
    on_device = [e for e in events if e.device_type.name == "CUDA" and not _is_label(e)]
    names = [e.name.lower() for e in on_device]  # cuDNN's kernel of either kind is called flash, too
    attention = {
        f"{kind}_kernels": sum(part in name and ("cudnn" in name) == (kind == "cudnn") for name in names)
        for kind, part in ATTENTION.items()
    }
    return attention | {
        "fused_kernels": attention["flash_kernels"] + attention["cudnn_kernels"],
        "kernels": sum(not e.name.startswith(COPIES) for e in on_device),
        "launches": sum(e.name in LAUNCHES for e in events),
        "device_busy_ms": round(sum(e.time_range.elapsed_us() for e in on_device) / 1e3, 2),
    }


def _is_label(event: Any) -> bool:
    return getattr(event, "is_user_annotation", False) or event.name.startswith(
        ("Optimizer.", "ProfilerStep")
    )


def timed(call: Callable[[], object], times: int, device: torch.device) -> list[float]:
    """Return the milliseconds of each call, until the device has finished it."""
    taken = []
    for _ in range(times):
        wait_for(device)
        began = time.perf_counter()
        call()
        wait_for(device)
        taken.append(1000 * (time.perf_counter() - began))
    return taken


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished what was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> str:
    """Return the rows as a Markdown table; a failed row shows its error in the last column."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [_text(row.get(column)) for column in columns]
        if "error" in row:
            cells[-1] = str(row["error"]).replace("|", "/")[:80]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
