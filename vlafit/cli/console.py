"""Console output of the verbs: tables, a progress line, the library's warnings. Main process only."""

import io
import logging
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from vlafit.errors import OUTPUT, printable

if TYPE_CHECKING:
    from vlafit.agreement import Agreement, Item

T = TypeVar("T")
WIDEST = 46  # characters of a cell in the agreement's table
WIDEST_LINE = 110  # characters of a line that would go on with names
NEWS = "vlafit.datasets.downloads"  # the logger of what is copied over a network, and of its progress
QUIET_EVERY_S = 15.0  # seconds between progress lines if stdout is not a terminal
# Messages caused by importing peft, which imports torchao and bitsandbytes if they are installed: kernels for
# other Pythons and GPUs, which vlafit does not use, and a deprecated call of torch.
IMPORT_NOISE = {  # logger -> part of its message
    "torchao": "Failed to load ",
    "torch.utils._pytree": "is an Enum subclass and is now natively supported",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
}


class _Stream:
    """A text stream that shows control characters as escapes; see `surviving_streams`.

    Names of tensors, cameras and episodes come from foreign files: an escape sequence in one of them could
    hide or forge what a terminal shows.
    """

    def __init__(self, stream: TextIO, survive: bool) -> None:
        self._stream, self._survive, self._closed = stream, survive, False

    def __getattr__(self, name: str) -> Any:  # isatty, encoding, fileno: those of the stream
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text; return its length."""
        return self._do(lambda: self._stream.write(printable(text)), len(text))

    def terminal(self) -> TextIO:
        """Return the stream for what draws with escape sequences itself."""
        return self._stream

    def flush(self) -> None:
        """Flush the stream."""
        self._do(lambda: self._stream.flush(), None)

    def close_quietly(self) -> None:
        """Flush the stream. If nobody can read it, the interpreter's own flush at its end must not fail."""
        self.flush()
        try:
            if self._closed:
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        except (OSError, ValueError):  # it has no descriptor, so there is nothing to flush
            return

    def _do(self, action: Callable[[], T], otherwise: T) -> T:
        if not self._survive:
            try:
                return action()
            except OSError as error:  # a full disk, say; a pipe without a reader has its own answer
                error.filename = error.filename or OUTPUT
                raise
        try:
            return otherwise if self._closed else action()
        except (OSError, ValueError):  # a broken pipe, a closed file, a terminal that is gone
            self._closed = True
            return otherwise


def _terminal(stream: TextIO) -> TextIO:
    return stream.terminal() if isinstance(stream, _Stream) else stream


@contextmanager
def surviving_streams(survive: bool) -> Iterator[None]:
    """Escape what a terminal cannot show; with `survive`, drop output once nobody can read it and go on."""
    old = sys.stdout, sys.stderr
    new = []
    for stream in old:
        stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - lives as long as sys's
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            # the latter in the locale C, where it writes bytes of paths, and fails at all other characters
            with suppress(OSError):  # of a file that became a pipe after Python opened it
                stream.reconfigure(errors="backslashreplace")
        new.append(_Stream(stream, survive))
    sys.stdout, sys.stderr = new
    try:
        yield
    finally:
        sys.stdout, sys.stderr = old
        for stream in new:
            if survive:
                stream.close_quietly()


@contextmanager
def logging_to_stderr(main_process: bool) -> Iterator[None]:
    """Show the library's warnings, and `NEWS`, on stderr while a verb runs, without `IMPORT_NOISE`."""
    for name, noise in IMPORT_NOISE.items():
        logging.getLogger(name).addFilter(_Without(noise))  # never removed: a process imports these once
    logger = logging.getLogger("vlafit")
    handler: logging.Handler = _WarningHandler() if main_process else logging.NullHandler()
    old_level, old_propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    news = logging.getLogger(NEWS)
    old_news = news.level
    news.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(old_level)
        news.setLevel(old_news)
        logger.propagate = old_propagate


@dataclass(frozen=True)
class _Without:
    """Drops log records that contain a text. Equal filters are added to a logger only once."""

    noise: str

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to keep the record."""
        return self.noise not in record.getMessage()


class _WarningHandler(logging.Handler):
    """Prints log records above the progress line, if one is shown; equal ones once."""

    def __init__(self) -> None:
        super().__init__()
        self._printed: set[str] = set()  # a forecast of memory applies one strategy to many policies

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        text = f"{prefix}{record.getMessage()}"
        if text in self._printed:
            return
        self._printed.add(text)
        line = Line.shown
        if line is not None:
            line.say(text)
        else:
            print(text, file=sys.stderr)


def duration(seconds: float) -> str:
    """Return a duration as text: ``42 s``, ``3:05``, ``2:03:05``."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    hours, rest = divmod(seconds, 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Line:
    """A progress line with the remaining time: redrawn on a terminal, printed at intervals elsewhere."""

    shown: "Line | None" = None  # the line on the screen, so that warnings can print above it

    def __init__(self, what: str, total: int, *, start: int = 0, on_stderr: bool = False) -> None:
        """`on_stderr` keeps stdout for the result; a short run then prints nothing unless on a terminal."""
        self.what, self.total, self.done, self.text = what, total, start, ""
        self._on_stderr, self._lines = on_stderr, 0
        self._start = start
        self._started = time.monotonic()
        self._printed = self._started
        self._terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._progress = None

    def __enter__(self) -> "Line":
        if self._terminal:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[text]}", markup=False),
                console=Console(highlight=False, file=_terminal(self._stream)),
                refresh_per_second=4,
            )
            self._task = self._progress.add_task(self.what, total=self.total, completed=self.done, text="")
            self._progress.start()
        Line.shown = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        Line.shown = None
        if self._progress is not None:
            self._progress.stop()
        elif self.done > self._start and (self._lines or not self._on_stderr):
            print(self._plain(), file=self._stream, flush=True)

    def update(self, done: int, text: str = "") -> None:
        """Show that `done` of the total are done, followed by `text`."""
        self.done, self.text = done, text
        if self._progress is not None:
            self._progress.update(self._task, completed=done, text=printable(self._status()))
        elif time.monotonic() - self._printed >= QUIET_EVERY_S and done < self.total:
            self._printed = time.monotonic()
            self._lines += 1
            print(self._plain(), file=self._stream, flush=True)

    def say(self, text: str) -> None:
        """Print a permanent line above the progress line."""
        if self._progress is not None:
            self._progress.console.print(printable(text), markup=False)
        else:
            print(text, file=self._stream, flush=True)

    @property
    def _stream(self) -> TextIO:
        return sys.stderr if self._on_stderr else sys.stdout

    def _status(self) -> str:
        elapsed = time.monotonic() - self._started
        done_now = self.done - self._start
        if self.done >= self.total:
            time_text = f"in {duration(elapsed)}"
        elif done_now > 0:
            time_text = f"{duration(elapsed / done_now * (self.total - self.done))} left"
        else:
            time_text = ""
        return "  ".join(part for part in (self.text, time_text) if part)

    def _plain(self) -> str:
        return f"{self.what} {self.done}/{self.total}  {self._status()}"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a plain text table; numeric columns are right-aligned."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *cells]) for i in range(len(header))]
    right = [
        all(not row[i] or row[i][0].isdigit() for row in cells) and bool(cells) for i in range(len(header))
    ]

    def line(row: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join([line(list(header)), *(line(row) for row in cells)])


def wrapped(line: str) -> list[str]:
    """Return a line in several of at most `WIDEST_LINE` characters; what follows the first is indented."""
    return textwrap.wrap(
        line, WIDEST_LINE, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def number(value: float) -> str:
    """Return a metric's value with four significant digits."""
    return f"{value:.4g}"


def size(count: int) -> str:
    """Return a number of parameters or bytes with a decimal prefix: ``12.3 M``."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.1f} {unit}"
    return str(count)


def rate(low: float, high: float) -> str:
    """Return a rule's learning-rate multiplier, or the range of its multipliers: ``0.32..1``."""
    return f"{high:.3g}" if low == high else f"{low:.3g}..{high:.3g}"


def agreement_table(agreement: "Agreement") -> str:
    """Return what the sides say, what holds and why; long texts go on below themselves, long lists of
    names are shortened (the report and agreement.json have them whole)."""
    rows: list[list[str]] = []
    for row in agreement.rows(short=True):
        cells = [textwrap.wrap(cell, WIDEST) or [""] for cell in row]
        height = max(len(lines) for lines in cells)
        rows += [[lines[i] if i < len(lines) else "" for lines in cells] for i in range(height)]
    return table(agreement.heads, rows)


def differences_table(agreement: "Agreement") -> str:
    """Return the agreement's points that are not the same on both sides, and how many are."""
    from vlafit.agreement.evaluation import statement

    rest = tuple(item for item in agreement.items if item.status != "same")
    shown = [agreement_table(replace(agreement, items=rest))] if rest else []
    return "\n".join(filter(None, [*shown, statement(agreement.items)]))


def evaluation_table(items: "Sequence[Item]") -> str:
    """Return the points of an evaluation, or of a served policy, that are not the same on both sides."""
    from vlafit.agreement import Agreement

    return differences_table(Agreement(tuple(items), (), (), ("protocol", "checkpoint")))


def plan_table(rows: list[dict]) -> str:
    """Return the tuning table as text; its last row is the total."""
    header = ("rule", "mode", "tensors", "parameters", "adapters", "trainable", "lr x", "optimiser bytes")
    cells = [
        (
            row["select"],
            row["mode"],
            row["tensors"],
            size(row["parameters"]),
            size(row["adapter"]) if row["adapter"] else "",
            size(row["trainable"]),
            rate(row["lr_lowest"], row["lr"]) if row["trainable"] and row["rule"] else "",
            size(row["optimiser_bytes"]),
        )
        for row in rows
    ]
    return table(header, cells)
