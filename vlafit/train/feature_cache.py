"""Keep the features of frozen towers, or the frozen prefix's keys and values, over the epochs of a run.

Features are computed in batches of one width, which samples of the same shape fill, so those of a sample
depend neither on the batch that first needs them nor on the number of processes: a run that is resumed, with
a full cache or an empty one, has the same bits as one that never stopped. They are kept under a hash of the
sample's pixels, prompt and masks; in a folder, below a hash of the frozen weights and of all else that
decides them.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from vlafit.datasets import ChunkDataset
from vlafit.entry_points import outside_hashes
from vlafit.errors import ConfigError, did_you_mean
from vlafit.nn.batch import Batch, no_images
from vlafit.nn.features import Cacheable, Features
from vlafit.nn.meta_kernels import MetaKernels
from vlafit.nn.policy import Policy
from vlafit.nn.rng import Keys
from vlafit.policies import family, family_name
from vlafit.recipe import Recipe
from vlafit.rollout.memory import free_bytes
from vlafit.train.dataloader import VALIDATION_ROWS
from vlafit.train.experiment import Experiment
from vlafit.train.feature_storage import (
    FeatureStorage,
    FolderStorage,
    MemoryStorage,
    Row,
    digest_of_row,
    digest_of_weights,
    folder_of,
    stored_bytes,
)
from vlafit.train.fit import workload_of
from vlafit.train.forecast import full_batch
from vlafit.train.processes import code_hash
from vlafit.tuning import Plan

OFF, MEMORY = "off", "memory"
HASHED = ("images", "image_mask", "tokens", "token_mask")  # of a sample: what features may depend on
FILLED_TOKENS = 1024  # in a batch that is computed: a CPU's products are then as fast as they get
WIDEST = 32
NAMES = {"prefix": "keys and values of the frozen prefix", "vision": "features of the frozen image tower"}


@final
class FeatureCache:
    """Gives batches their features, from a storage or computed and then stored."""

    def __init__(
        self,
        policy: Policy,
        cacheable: Cacheable,
        storage: FeatureStorage,
        device: torch.device,
        *,
        bf16: bool = False,
        multiple: int = 1,
    ) -> None:
        """`bf16` computes under autocast; the tokens of a batch's features are a multiple of `multiple`."""
        self.policy, self.cacheable, self.storage = policy, cacheable, storage
        self.device, self._bf16, self._multiple = device, bf16, multiple
        self.computed = 0
        """Samples whose features were computed."""
        self.read = 0
        """Samples whose features were kept."""
        self._digests: dict[int, str] = {}

    def attach(self, batch: Batch, trimmed: Batch, indices: Sequence[int] | None = None) -> Batch:
        """Return `trimmed` with the features of `batch`, of which it was trimmed, and without its images.

        `indices` name the samples where a name always means the same pixels and prompt: they are then hashed
        only once.
        """
        digests = [self._digest(batch, i, None if indices is None else indices[i]) for i in range(len(batch))]
        kept = {digest: self.storage.get(digest) for digest in dict.fromkeys(digests)}
        missing = [digests.index(digest) for digest, row in kept.items() if row is None]
        for number, row in self._compute(batch, missing):
            kept[digests[number]] = row
            self.storage.put(digests[number], row)
        self.computed += len(missing)
        self.read += len(batch) - len(missing)
        features = self._together([row for digest in digests if (row := kept[digest]) is not None], trimmed)
        return replace(trimmed, **no_images(trimmed.images, "cpu"), features=features)

    @property
    def sentence(self) -> str:
        """How often features were kept, for the log."""
        total = self.computed + self.read
        return f"train.cache: features were computed for {self.computed} of {total} samples, else kept"

    def _digest(self, batch: Batch, number: int, index: int | None) -> str:
        digest = None if index is None else self._digests.get(index)
        if digest is None:
            present = batch.present()
            digest = digest_of_row({name: present[name][number] for name in HASHED if name in present})
            if index is not None:
                self._digests[index] = digest
        return digest

    def _compute(self, batch: Batch, numbers: Sequence[int]) -> Iterator[tuple[int, Row]]:
        """Yield the features of these samples of a batch, in batches of samples of one shape."""
        shapes: dict[tuple[object, ...], list[int]] = {}
        for number in numbers:
            single = _rows_of(batch, [number]).trim()
            length = 0 if single.tokens is None else single.tokens.shape[1]
            shapes.setdefault((*batch.image_mask[number].tolist(), length, single.all_real), []).append(
                number
            )
        for some in shapes.values():
            width = self._width(_rows_of(batch, some[:1]).trim())
            for begin in range(0, len(some), width):
                group = some[begin : begin + width]
                filled = group + group[:1] * (width - len(group))
                rows = self._features(_rows_of(batch, filled).trim())[: len(group)]
                yield from zip(group, rows, strict=True)

    def _width(self, single: Batch) -> int:
        """Return how many samples of a shape are computed at once: a power of two."""
        most = FILLED_TOKENS // max(1, self.policy.tokens(single, draws=0))
        return 1 << (min(WIDEST, max(1, most)).bit_length() - 1)

    def _features(self, batch: Batch) -> list[Row]:
        training = self.policy.training
        self.policy.eval()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
            features = self.policy.features(self.cacheable.kind, batch.to(self.device))
        self.policy.train(training)
        tensors = [tensor.cpu() for tensor in features.tensors]
        valid = None if features.valid is None else features.valid.cpu()
        # Copies: a view would keep the storage of all rows.
        return [
            tuple(tensor[row].clone() if valid is None else tensor[row][valid[row]] for tensor in tensors)
            for row in range(len(batch))
        ]

    def _together(self, rows: Sequence[Row], trimmed: Batch) -> Features:
        if self.cacheable.of == "cameras":
            places = trimmed.image_mask
        else:
            lengths = torch.tensor([len(row[0]) for row in rows])
            longest = max(1, int(lengths.max()))
            longest += -longest % self._multiple
            places = torch.arange(longest) < lengths[:, None]
        tensors = tuple(self._padded([row[n] for row in rows], places) for n in range(len(rows[0])))
        return Features(self.cacheable.kind, tensors, None if bool(places.all()) else places)

    def _padded(self, rows: Sequence[Tensor], places: Tensor) -> Tensor:
        """Return rows [u, ...] as one tensor [b, u, ...], 0 where `places` [b, u] is False."""
        if bool(places.all()):
            return torch.stack(list(rows))
        if self.cacheable.of == "tokens":
            width = places.shape[1]
            return torch.stack([_pad(row, width - len(row)) for row in rows])
        padded = rows[0].new_zeros(*places.shape, *rows[0].shape[1:])
        for number, row in enumerate(rows):
            padded[number, places[number]] = row
        return padded


def _pad(row: Tensor, missing: int) -> Tensor:
    return F.pad(row, (0, 0) * (row.ndim - 1) + (0, missing)) if missing else row


def _rows_of(batch: Batch, numbers: Sequence[int]) -> Batch:
    return replace(batch, **{name: value[list(numbers)] for name, value in batch.present().items()})


# ------------------------------------------------------------------------------------- what can be cached


def cacheable_of(policy: Policy, plan: Plan) -> Cacheable | None:
    """Return what saves most of what no stage of the plan trains or adapts; None if nothing can be kept."""
    stages = [plan.at(number) for number in range(len(plan.strategy.stages))]
    trained = {entry.adapts or entry.name for stage in stages for entry in stage.entries if entry.trainable}
    for candidate in policy.cacheable():
        if not any(name.startswith(_heads(policy, candidate)) for name in trained):
            return candidate
    return None


def _heads(policy: Policy, cacheable: Cacheable) -> tuple[str, ...]:
    """Return what the names of all tensors of the modules begin with."""
    names = {id(module): name for name, module in policy.named_modules()}
    return tuple(f"{names[id(module)]}." for module in cacheable.modules)


def problems(recipe: Recipe, policy: Policy, plan: Plan) -> Iterator[str]:
    """Yield why a run cannot keep features."""
    where, off = f"train.cache = {recipe.train.cache!r}", 'set train.cache to "off"'
    name = family_name(policy)
    if not policy.cacheable():
        yield f"{where}: the family {name!r} declares nothing that can be kept; {off}"
        return
    if recipe.data.shift_pixels:
        yield (
            f"{where}: data.shift_pixels = {recipe.data.shift_pixels} changes the pixels in every epoch, so "
            f"kept features would not be theirs; set data.shift_pixels to 0, or {off}"
        )
    if recipe.train.shards:
        yield (
            f"{where}: no process holds all frozen weights (train.sharding = {recipe.train.sharding!r}), so "
            f'none can compute features by itself; set train.sharding to "none", or {off}'
        )
    cacheable = cacheable_of(policy, plan)
    if cacheable is None:
        towers = ", ".join(dict.fromkeys(NAMES[candidate.kind] for candidate in policy.cacheable()))
        yield (
            f"{where}: strategy {plan.strategy.name!r} trains or adapts the image tower in one of its stages,"
            f" so there are no {towers} to keep; take a strategy that freezes it, such as 'expert', or {off}"
        )
    elif recipe.train.cache != MEMORY and any(
        name.startswith(_heads(policy, cacheable)) for name in plan.quantised
    ):
        yield (
            f"{where}: quantised weights have no hash that a folder could be named by; set train.cache to "
            f'"{MEMORY}", or {off}'
        )


def folder_problem(cache: str) -> str:
    """Return what is wrong with the value of `train.cache`; "" for a valid one."""
    if cache in (OFF, MEMORY) or "/" in cache or Path(cache).is_dir():
        return ""
    return (
        f"train.cache {cache!r} is none of {OFF!r}, {MEMORY!r} and no folder"
        f"{did_you_mean(cache, (OFF, MEMORY))}; a folder that is to be made needs a '/', such as ./{cache}"
    )


# -------------------------------------------------------------------------------------------------- size


@dataclass(frozen=True)
class CacheSize:
    """The room that a run's features take at most."""

    kind: str
    samples: int
    """Samples that the run sees, those of validation included."""
    sample_bytes: int
    """Of one sample with every camera and the longest prompt."""

    @property
    def total(self) -> int:
        return self.samples * self.sample_bytes

    @property
    def sentence(self) -> str:
        """Name the size for the log."""
        return (
            f"{NAMES[self.kind]} of {self.samples:,} samples, at most {_size(self.total)} "
            f"({_size(self.sample_bytes)} each)"
        )


def size_of(experiment: Experiment, kind: str) -> CacheSize:
    """Return the size of a run's features of a kind; nothing is computed."""
    recipe, data, policy = experiment.recipe, experiment.data, experiment.policy
    chunk, history = experiment.codecs.chunk, experiment.codecs.history
    rows = len(ChunkDataset(data.stores, chunk, data.training, history))
    rows += sum(len(one.training) for one in data.vision_language)
    samples = min(rows, recipe.train.steps * recipe.train.samples)
    most = recipe.train.validation_batches * VALIDATION_ROWS
    lengths = [
        [store.episodes[store.index(identity)].length for identity in ids]
        for store, ids in zip(data.stores, data.validation, strict=True)
    ]
    samples += min(most, sum(map(sum, lengths)))
    samples += sum(min(most, len(one.validation)) for one in data.vision_language)
    for stores in experiment.validation_sets.values():
        samples += min(most, sum(episode.length for store in stores for episode in store.episodes))
    work = workload_of(recipe, policy, data, 1)
    meta = family(family_name(policy)).build(policy.config, "meta").to("meta")
    batch = replace(full_batch(meta.needs(), 1, work.cameras, work.tokens).to("meta"), all_real=True)
    with MetaKernels(bf16=False, cached=False):
        features = meta.features(kind, batch)
    numbers = sum(tensor.numel() for tensor in features.tensors)
    return CacheSize(kind, samples, numbers * (2 if recipe.train.precision == "bf16" else 4))


def require_cache(experiment: Experiment, processes: int) -> str:
    """Return a sentence with the size of the cache that the recipe asks for; "" without one.

    `processes` are those of this machine. Raises ConfigError where there can be no cache.
    """
    recipe = experiment.recipe
    if recipe.train.cache == OFF:
        return ""
    for problem in problems(recipe, experiment.policy, experiment.plan):
        raise ConfigError(problem)
    cacheable = cacheable_of(experiment.policy, experiment.plan)
    assert cacheable is not None
    size = size_of(experiment, cacheable.kind)
    if recipe.train.cache == MEMORY:
        needed, free, place = size.total * processes, free_bytes(), "free memory"
        if processes > 1:
            place += f" for {processes} processes that keep one each (a folder is shared)"
    else:
        folder = Path(recipe.train.cache)
        needed, place = size.total, f"free on the disk of {folder}"
        if folder.is_dir():  # only then: the key has a hash of all frozen weights
            device = next(experiment.policy.parameters()).device
            key = _key(experiment.policy, cacheable, recipe.train.precision == "bf16", device)
            needed -= stored_bytes(folder_of(folder, key))
        free = shutil.disk_usage(_existing(folder)).free
    where = f"train.cache = {recipe.train.cache!r}"
    require_room(where, size, needed, free, place)
    return f"{where}: {size.sentence}; {_size(free)} {place}"


def require_room(where: str, size: CacheSize, needed: int, free: int, place: str) -> None:
    """Raise ConfigError if the `needed` bytes of a cache are more than are free."""
    if needed > free:
        raise ConfigError(
            f"{where}: no room for the {size.sentence}; {_size(free)} {place}. Choose a folder on a larger "
            f'disk, or set train.cache to "{OFF}"'
        )


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())


def _size(number: int) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 10**9 else f"{number / 1e6:,.2f} MB"


# ----------------------------------------------------------------------------------------------- opening


def open_cache(
    policy: Policy, plan: Plan, recipe: Recipe, device: torch.device, multiple: int
) -> FeatureCache | None:
    """Return the cache that the recipe asks for; None without one."""
    if recipe.train.cache == OFF:
        return None
    cacheable = cacheable_of(policy, plan)
    if cacheable is None:
        raise AssertionError("require_cache has refused this run")
    bf16 = recipe.train.precision == "bf16"
    storage: FeatureStorage
    if recipe.train.cache == MEMORY:
        storage = MemoryStorage()
    else:
        storage = FolderStorage(Path(recipe.train.cache), _key(policy, cacheable, bf16, device))
    multiple = multiple if policy.compiled else 1
    return FeatureCache(policy, cacheable, storage, device, bf16=bf16, multiple=multiple)


def _key(policy: Policy, cacheable: Cacheable, bf16: bool, device: torch.device) -> dict[str, object]:
    """Return what decides features besides the sample."""
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        machine = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return {
        "kind": cacheable.kind,
        "family": family_name(policy),
        "config": repr(policy.config),
        "weights": digest_of_weights(cacheable.modules),
        "precision": "bf16" if bf16 else "fp32",
        "width": [FILLED_TOKENS, WIDEST],
        "code": code_hash("nn", "policies"),
        "modules": outside_hashes(),
        "torch": torch.__version__,
        "machine": machine,
    }


def indices_of(keys: Keys) -> list[int]:
    """Return the numbers of samples in the training data."""
    return [index for _, index in keys]
