"""Load batches for training and validation: which samples, in which order, on which process."""

import math
import multiprocessing
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vlafit.codec import Codec, Encoded
from vlafit.datasets import ChunkDataset, EpisodeStore, MixtureOrder, SampleOrder, shift_images
from vlafit.datasets.bench import ENOUGH
from vlafit.errors import ConfigError, TrainingError, VlafitError
from vlafit.nn.batch import Batch, stack
from vlafit.nn.rng import Keys
from vlafit.train.answers import AnswerSamples, training_samples
from vlafit.train.experiment import Experiment
from vlafit.train.prefetch import Prefetcher, warn_of_repeated_copies

VALIDATION_ROWS = 32  # of one unit of train.validation_batches, whatever the batch size of training
SHARED_AT_LEAST = 2**30  # bytes of shared memory that workers are started with by default
KEPT_BYTES = 2**30  # of encoded samples, over all workers of a process
GRACE_S = 2.0  # wait for a worker to exit after its connection broke


class EncodedSamples(Dataset[tuple[tuple[int, int], Encoded]]):
    """Read, augment and encode samples by (epoch, index), in a dataloader worker.

    Samples that no augmentation changes are kept until they fill `keep_bytes`, so that later epochs of a
    small dataset decode no frame again. None is ever evicted: in shuffled epochs, the share that fits is the
    share that is not read again.
    """

    def __init__(
        self,
        chunks: ChunkDataset,
        codec: Codec | Sequence[Codec],
        shift_pixels: int,
        seed: int,
        keep_bytes: int = 0,
        answers: AnswerSamples | None = None,
    ) -> None:
        """`codec` encodes all samples, or there is one for each store of `chunks`. `answers` come last."""
        self.chunks, self.shift_pixels, self.seed = chunks, shift_pixels, seed
        self.codecs = [codec] * len(chunks.stores) if isinstance(codec, Codec) else list(codec)
        self._answers = answers
        self._room = 0 if shift_pixels else keep_bytes
        self._kept: dict[int, Encoded] = {}

    def __getitem__(self, key: tuple[int, int]) -> tuple[tuple[int, int], Encoded]:
        kept = self._kept.get(key[1])
        if kept is not None:
            return key, kept
        encoded = self._encoded(*key)
        size = sum(value.nbytes for value in vars(encoded).values() if isinstance(value, np.ndarray))
        if size <= self._room:
            self._room -= size
            self._kept[key[1]] = encoded
        return key, encoded

    def _encoded(self, epoch: int, index: int) -> Encoded:
        if self._answers is not None and index >= len(self.chunks):
            return self._answers[index - len(self.chunks)]
        sample = self.chunks[index]
        if self.shift_pixels:
            sample = shift_images(sample, self.shift_pixels, seed=self.seed, epoch=epoch, index=index)
        return self.codecs[self.chunks.store_of(index)].encode(sample)

    def __len__(self) -> int:
        return len(self.chunks) + (0 if self._answers is None else len(self._answers))


def workers_for(device: torch.device, cores: int, processes: int, shared_bytes: int) -> int:
    """Return the workers of each of a machine's `processes` where the recipe leaves them open.

    A GPU waits while its process decodes frames; a CPU computes on the cores that workers would take.
    """
    if device.type != "cuda" or shared_bytes < SHARED_AT_LEAST:
        return 0
    return max(0, min(ENOUGH, cores // max(1, processes) - 1))


def shared_memory() -> int:
    """Return the free bytes of shared memory; 0 where there is none."""
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return 0


def _collate(rows: Sequence[tuple[tuple[int, int], Encoded]]) -> tuple[Keys, Batch]:
    return [key for key, _ in rows], stack([encoded for _, encoded in rows])


def rows_per_process(batch_size: int, accumulate: int, processes: int) -> int:
    """Return the rows of one micro-batch of one process. Raises ConfigError if they would differ."""
    size, rest = divmod(batch_size, accumulate * processes)
    if rest or not size:
        near = accumulate * processes * max(1, round(batch_size / (accumulate * processes)))
        raise ConfigError(
            f"train.batch_size {batch_size} is not a multiple of train.accumulate {accumulate} x processes "
            f"{processes}; use {near}"
        )
    return size


def rows_of(
    batch: Sequence[tuple[int, int]], accumulate: int, rank: int, world: int
) -> list[list[tuple[int, int]]]:
    """Return this process's micro-batches of a global batch; every process gets the same number of rows."""
    size = rows_per_process(len(batch), accumulate, world)
    return [list(batch[(m * world + rank) * size :][:size]) for m in range(accumulate)]


def training_batches(
    experiment: Experiment, *, first_step: int, rank: int, world: int
) -> Iterator[list[tuple[Keys, Batch]]]:
    """Yield this process's micro-batches of optimiser step `first_step`, `first_step` + 1, ...

    The order only depends on seed and step, so resuming needs no dataloader state.
    """
    recipe, data = experiment.recipe, experiment.data
    train = recipe.train
    codecs = experiment.codecs
    chunks = ChunkDataset(data.stores, codecs.chunk, data.training, codecs.history)
    workers = (
        0 if recipe.data.workers == "auto" else recipe.data.workers
    )  # a run has chosen; see `workers_for`
    keep_bytes = KEPT_BYTES // max(1, workers)
    own = [experiment.codec_of(store) for store in data.stores]
    answers = training_samples(data, next(iter(codecs)))
    samples = EncodedSamples(chunks, own, recipe.data.shift_pixels, train.seed, keep_bytes, answers)
    warn_of_repeated_copies(chunks, recipe.data.mixed_files)
    questions = [(len(one.training), one.weight) for one in data.vision_language]
    order, ahead_of = (
        order_of(chunks, data.weights, train.seed, recipe.data.mixed_files, questions) for _ in range(2)
    )

    def rows_at(step: int, order: SampleOrder | MixtureOrder) -> list[list[tuple[int, int]]]:
        return rows_of(order.batch(step, train.samples), train.micro_batches, rank, world)

    def samples_at(step: int) -> list[int]:  # called by another thread, so with an order of its own
        drawn = (index for rows in rows_at(step, ahead_of) for _, index in rows)
        return [index for index in drawn if index < len(chunks)]

    wanted = (rows for step in range(first_step, train.steps) for rows in rows_at(step, order))
    loader = DataLoader(
        samples,
        batch_sampler=_Rows(wanted),
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_start_worker,
        multiprocessing_context="spawn" if workers else None,
        pin_memory=next(experiment.policy.parameters()).device.type == "cuda",
    )

    def steps() -> Iterator[list[tuple[Keys, Batch]]]:
        with Prefetcher(chunks, samples_at) as ahead:
            ahead.go_on(first_step, train.steps)
            processes = _Workers(loader)
            for step in range(first_step, train.steps):
                ahead.go_on(step, train.steps)
                yield [processes.next() for _ in range(train.micro_batches)]

    return steps()


def order_of(
    chunks: ChunkDataset,
    weights: Sequence[float],
    seed: int,
    mixed_files: int = 0,
    questions: Sequence[tuple[int, float]] = (),
) -> SampleOrder | MixtureOrder:
    """Return the order of the samples of all processes; `weights`, if any, are those of the stores.

    `questions` are size and weight of each set of questions about images, which come after the stores.
    """
    files = chunks.files() if mixed_files else None
    if weights:
        sizes, shares = [size for size, _ in questions], [weight for _, weight in questions]
        if files is not None:  # a set is one file
            last = int(files.max())
            files = np.concatenate([files, *(np.full(size, last + 1 + n) for n, size in enumerate(sizes))])
        return MixtureOrder([*chunks.sizes, *sizes], [*weights, *shares], seed, files, mixed_files)
    return SampleOrder(len(chunks), seed, files=files, mixed=mixed_files)


def _start_worker(_: int) -> None:
    """Ignore SIGINT in workers; the main process still needs the batch in flight."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Start processes that a Ctrl-C in the terminal cannot end while they still import torch.

    They inherit the blocked signal; here it waits until the block ends.
    """
    resource_tracker.ensure_running()  # starting it later would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Workers:
    """The dataloader's processes. If one dies, the error is raised where its batch is awaited, nowhere else.

    torch's SIGCHLD handler would raise in whatever the training process is doing, such as saving.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        before, handler = multiprocessing.active_children(), signal.getsignal(signal.SIGCHLD)
        workers = loader.num_workers
        try:
            if workers:
                # As many locks as the loader has, or more: it fails here, before torch has a half-made one.
                context = multiprocessing.get_context("spawn")
                locks = [context.Lock() for _ in range(8 + 4 * workers)]
                del locks  # the loader's own take their place
            with _sigint_blocked():
                self.stream = iter(loader)
        except OSError as error:  # locks lie in shared memory, too
            raise TrainingError(_no_shared_memory(workers, error.strerror or str(error))) from error
        self._processes = [child for child in multiprocessing.active_children() if child not in before]
        if self._processes and threading.current_thread() is threading.main_thread():
            own = not callable(handler) or not handler.__module__.startswith("torch.")
            signal.signal(signal.SIGCHLD, handler if own else signal.SIG_DFL)

    def next(self) -> tuple[Keys, Batch]:
        """Return the next micro-batch. Raises TrainingError if the worker that loads it died."""
        try:
            return next(self.stream)
        except VlafitError as error:
            raise type(error)(_own_message(error)) from error
        except (RuntimeError, OSError, EOFError) as error:
            if "/torch_" in str(error):  # the name of a batch in shared memory
                reason = str(error).strip().splitlines()[-1]
                raise TrainingError(_no_shared_memory(len(self._processes), reason)) from error
            sentinels = {process.sentinel: process for process in self._processes}
            ended = wait(list(sentinels), timeout=GRACE_S) if sentinels else []
            if not ended:
                raise
            raise TrainingError(_death(sentinels[ended[0]], len(sentinels))) from error  # type: ignore[index]


def _own_message(error: VlafitError) -> str:
    """Return the message of an error as it was raised: torch puts a worker's traceback in front of it."""
    text = str(error)
    name = f"{type(error).__module__}.{type(error).__qualname__}: "
    return text.rpartition(name)[2].strip() if text.startswith("Caught ") else text


def _death(process: BaseProcess, workers: int) -> str:
    process.join(GRACE_S)
    code = process.exitcode or 0
    cause = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
    if code == -signal.SIGBUS:  # a batch was written beyond what there is
        return _no_shared_memory(workers, f"dataloader worker {process.pid} {cause}")
    hint = ", which usually means out of memory" if code == -signal.SIGKILL else ""
    return (
        f"dataloader worker {process.pid} {cause}{hint}. Lower data.workers (now {workers}; 0 loads in the "
        "training process): each worker has its own copy of the program and its batches. The same command "
        "with --resume continues from the last checkpoint"
    )


def _no_shared_memory(workers: int, reason: str) -> str:
    return (
        "dataloader workers pass batches through shared memory (/dev/shm), and it is full, too small or not"
        f" there: {reason}. Enlarge it (docker run --shm-size=8g), or set data.workers = 0 (now {workers});"
        " the same command with --resume goes on from the last checkpoint"
    )


class _Rows:
    """A batch sampler for DataLoader from an iterator of batches of keys."""

    def __init__(self, batches: Iterator[list[tuple[int, int]]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self._batches


def validation_batches(experiment: Experiment, *, rank: int, world: int) -> list[tuple[Keys, Batch]]:
    """Return this process's share of the validation samples, evenly spread over the held-out episodes.

    The samples depend neither on the number of processes nor on the batch size. Each process gets the same
    number of batches.
    """
    data = experiment.data
    return _spread(experiment, data.stores, data.validation, rank, world) if any(data.validation) else []


def named_validation_batches(
    experiment: Experiment, *, rank: int, world: int
) -> dict[str, list[tuple[Keys, Batch]]]:
    """Return this process's share of each named validation set, over all of its episodes.

    With several embodiments the held-out episodes of each are a set, too.
    """
    parts = experiment.data.parts() if len(experiment.codecs) > 1 else {}
    held_out = {
        name: _spread(experiment, part.stores, part.validation, rank, world)
        for name, part in parts.items()
        if any(part.validation)
    }
    codec = next(iter(experiment.codecs))
    answered = {
        one.name: _answered(experiment, AnswerSamples([(one, one.validation)], codec), rank, world)
        for one in experiment.data.vision_language
        if one.validation
    }
    return (
        held_out
        | answered
        | {
            name: _spread(
                experiment, stores, [[e.id for e in store.episodes] for store in stores], rank, world
            )
            for name, stores in experiment.validation_sets.items()
        }
    )


def validation_pieces(total: int, rows: int, world: int) -> int:
    """Return the number of batches of about `rows` rows into which `total` >= `world` samples are divided.

    It is a multiple of the number of processes, and none of them is empty: with one row for each process, a
    few batches may hold two.
    """
    return world * min(math.ceil(total / (rows * world)), total // world)


def _spread(
    experiment: Experiment,
    stores: Sequence[EpisodeStore],
    episodes: Sequence[Sequence[str]],
    rank: int,
    world: int,
) -> list[tuple[Keys, Batch]]:
    codecs = experiment.codecs
    chunks = ChunkDataset(stores, codecs.chunk, episodes, codecs.history)
    samples = EncodedSamples(chunks, [experiment.codec_of(store) for store in stores], 0, 0)
    return _batches(experiment, len(chunks), lambda index: samples[0, index][1], rank, world)


def _answered(
    experiment: Experiment, samples: AnswerSamples, rank: int, world: int
) -> list[tuple[Keys, Batch]]:
    return _batches(experiment, len(samples), samples.__getitem__, rank, world)


def _batches(
    experiment: Experiment, count: int, sample: Callable[[int], Encoded], rank: int, world: int
) -> list[tuple[Keys, Batch]]:
    """Return this process's share of validation samples, evenly spread over `count`."""
    recipe = experiment.recipe
    size = rows_per_process(recipe.train.samples, recipe.train.micro_batches, world)
    wanted = min(count, recipe.train.validation_batches * VALIDATION_ROWS)
    total = max(wanted, world)  # every process needs one
    pieces = validation_pieces(total, size, world)
    chosen = [(0, i * count // total) for i in range(total)]
    return [
        _collate([(key, sample(key[1])) for key in chosen[p * total // pieces : (p + 1) * total // pieces]])
        for p in range(rank, pieces, world)
    ]
