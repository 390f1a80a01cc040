"""Copy the files of coming samples, of datasets that are read in place, in the order of training."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Condition, Thread
from types import TracebackType

from vlafit.datasets import ChunkDataset
from vlafit.datasets.downloads import as_text
from vlafit.errors import VlafitError

log = logging.getLogger(__name__)

AT_ONCE = 4  # files
MOST_SAMPLES = 100_000  # that are looked at


def warn_of_repeated_copies(chunks: ChunkDataset, mixed_files: int) -> None:
    """Log a warning for a dataset that is larger than the cache, and whose samples need all of it at once."""
    for number, store in enumerate(chunks.stores):
        cache = 2 * store.ahead()
        sizes = dict(
            pair for n, episode in chunks.episodes() if n == number for pair in store.files_of(episode)
        )
        total, largest = sum(sizes.values()), max(sizes.values(), default=0)
        files = max(1, cache // (4 * max(1, len(store.embodiment.cameras)) * max(1, largest)))
        if cache and total > cache and (not mixed_files or mixed_files > files):
            log.warning(
                "dataset %r: its files have %s, %s of them are kept, and %s: files are copied again for "
                "nearly every sample. Set data.mixed_files = %d, or VLAFIT_CACHE_SIZE to more",
                store.card.name, as_text(total), as_text(cache),
                f"data.mixed_files is {mixed_files}" if mixed_files else "samples are in random order", files,
            )  # fmt: skip


class Prefetcher:
    """A thread that has files copied before the samples in them are read; it does nothing if all are here.

    Ahead of the present step it goes as far as the files fill half of the cache, so that none is deleted
    before it is read. A file that cannot be copied is named when it is read.
    """

    def __init__(self, chunks: ChunkDataset, samples_at: Callable[[int], Sequence[int]]) -> None:
        """`samples_at` returns the samples of a step, by their positions in `chunks`."""
        self._chunks, self._samples_at = chunks, samples_at
        self._limits = [store.ahead() for store in chunks.stores]
        self._turn = Condition()
        self._step, self._steps, self._ended = -1, 0, False
        self._thread = Thread(target=self._run, daemon=True, name="prefetch")

    def __enter__(self) -> "Prefetcher":
        if any(self._limits):
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._turn:
            self._ended = True
            self._turn.notify()

    def go_on(self, step: int, steps: int) -> None:
        """Go on from `step`, the next that is trained, of `steps`."""
        with self._turn:
            self._step, self._steps = step, steps
            self._turn.notify()

    def coming(self, step: int, steps: int) -> list[tuple[int, Path]]:
        """Return (number of the store, file) of the files that are needed from `step` on, in that order."""
        limit, size, seen = min(filter(None, self._limits)), 0, 0
        files: dict[tuple[int, Path], None] = {}
        episodes: set[tuple[int, int]] = set()
        for later in range(step, steps):
            samples = self._samples_at(later)
            seen += len(samples)
            for position in samples:
                number, episode, _ = self._chunks.place(position)
                if (number, episode) in episodes:
                    continue
                episodes.add((number, episode))
                for path, length in self._chunks.stores[number].files_of(episode):
                    if (number, path) in files:
                        continue
                    size += length
                    if size > limit:
                        return list(files)
                    files[number, path] = None
            if seen > MOST_SAMPLES:
                break
        return list(files)

    def _run(self) -> None:
        done = -1
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="prefetch") as pool:
            while True:
                with self._turn:
                    while not self._ended and self._step <= done:
                        self._turn.wait()
                    if self._ended:
                        return
                    done, steps = self._step, self._steps
                self._copy(pool, self.coming(done, steps))

    def _copy(self, pool: ThreadPoolExecutor, files: Sequence[tuple[int, Path]]) -> None:
        running: set[Future[None]] = set()
        for number, path in files:
            if self._ended:
                return
            running.add(pool.submit(self._copy_one, number, path))
            if len(running) >= AT_ONCE:
                running = wait(running, return_when=FIRST_COMPLETED).not_done
        wait(running)

    def _copy_one(self, number: int, path: Path) -> None:
        try:
            self._chunks.stores[number].copy_ahead(path)
        except VlafitError as error:
            log.warning("a file of coming samples is not copied ahead: %s", error)
