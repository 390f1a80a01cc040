"""The abstract policy: what training, evaluation and checkpoints know of a model.

A family says which parts its parameters belong to, what it needs as input, what its loss is and how it acts;
docs/extending.md describes the contract. `loss` is the module's `forward`, because DDP and FSDP act only
through `__call__`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from vlafit.codec.images import Framing
from vlafit.codec.normaliser import Normalisation
from vlafit.codec.prompts import Prompt
from vlafit.errors import CodecError
from vlafit.nn.batch import Batch
from vlafit.nn.features import Cacheable, Features
from vlafit.nn.kinds import Kind
from vlafit.nn.packing import PrefixShape
from vlafit.nn.rng import SampleRng

if TYPE_CHECKING:
    from vlafit.nn.attached import Attached

MOST_SAMPLING_STEPS = 10**4
ERROR = "error"  # the name of the only term of a loss that does not name its terms
TOKEN = "token"  # the name of the cross-entropy of action tokens


@dataclass(frozen=True)
class ParameterInfo:
    """Where a parameter sits. `layer` counts from 0 among the part's `layers`, None outside them.

    `part` is a name that the family chooses; strategies select by it. The shipped strategies use "vision",
    "projector", "language", "expert" and "projections". `dead` parameters never learn, and are
    kept for the sake of checkpoints: they feed nothing, or are constants.
    """

    name: str
    part: str
    kind: Kind
    layer: int | None
    layers: int
    dead: bool = False


@dataclass(frozen=True)
class ActionTokens:
    """How a policy that learns to write actions as tokens wants them."""

    longest: int
    """Tokens of the action part, special ones included."""
    bos: int | None = None
    """The token that begins a sequence, which must be the tokenizer's; None: any."""
    eos: int | None = None
    """The token that ends one, which must be the tokenizer's; None: any."""
    begins_with_bos: bool = False
    """Whether the action part begins with `bos`."""
    answered: bool = True
    """Whether `act` answers with them. False: only a loss has them as targets; it answers with numbers."""


@dataclass(frozen=True)
class ActionBins:
    """How a policy that writes each value of an action as one of 256 tokens wants them."""

    end: int
    """Tokens of its tokenizer, of which the bins are the last."""
    longest: int
    """Tokens of the longest chunk, with the one that ends the sequence."""
    eos: int
    """The token that ends the sequence."""
    ends: bool = True
    """Whether an answer ends at that token; False: every place of a chunk holds a token of its own."""


@dataclass(frozen=True)
class ActionLayout:
    """What the dimensions of an action are to a policy whose loss and weights take them for these."""

    name: str
    text: str
    counts: tuple[int, ...]
    """Numbers of dimensions that a robot may have."""
    poses: bool
    """Whether some are poses of a hand."""
    remedy: str
    """How to learn a robot's dimensions without them."""


@dataclass(frozen=True)
class Needs:
    """A policy's requirements of the codec that feeds it."""

    image_size: int
    state_dim: int
    action_dim: int
    chunk: int
    prompt: Prompt | None = None
    """How it is asked, unless its checkpoint says otherwise. None: it reads no instruction."""
    max_tokens: int = 0
    """Tokens of the prompt; 0 without one."""
    vocabulary: int = 0
    """Tokens that the policy knows; 0 without a prompt. A tokenizer made from the data takes at least 259."""
    framing: Framing = "openpi"
    """How images are fitted to `image_size`, unless its checkpoint says otherwise."""
    history: int = 1
    """Observation steps, the newest included."""
    normalisation: Normalisation = "mean_std"
    """How states and actions are normalised, unless its checkpoint or the recipe says otherwise."""
    embodiments: int = 0
    """Embodiments that have weights of their own, by `Batch.embodiment_id`; 0: all weights are shared."""
    embodiment_field: str = ""
    """The field of the config that says whose weights are used."""
    embodiment_rows: tuple[int, ...] = ()
    """Its numbers where it may name several: `Batch.embodiment_id` is an index into them."""
    cameras: int = 0
    """Cameras that it takes at most; 0: any number."""
    sees_missing: bool = False
    """Whether the black image of a missing camera is seen like any other; else missing cameras are masked."""
    action_tokens: ActionTokens | None = None
    """How it learns to write actions as tokens of a FAST tokenizer; None: it does not."""
    action_bins: ActionBins | None = None
    """How it writes each value as a token; None: it does not."""
    action_layout: ActionLayout | None = None
    """What each dimension of an action must be; None: anything."""
    learns_answers: bool = False
    """Whether its token loss may also be of answers to questions about images, which have no actions."""

    @property
    def writes_tokens(self) -> bool:
        """Whether `Policy.act` returns tokens instead of numbers."""
        return self.answers is not None or self.action_bins is not None

    @property
    def answers(self) -> ActionTokens | None:
        """The tokens of a FAST tokenizer that `act` returns; None: it returns something else."""
        tokens = self.action_tokens
        return tokens if tokens is not None and tokens.answered else None


@dataclass(frozen=True)
class Source:
    """The checkpoint that a policy's weights, or those below its adapters, were read from."""

    checkpoint: str
    """A path, or a name that finds it."""
    sha256: str = ""
    """See `vlafit.checkpoints.digest`. Empty: not known (hashing another program's files takes long)."""
    config: Mapping[str, object] = field(default_factory=dict)
    """The `config` that `load` needed to read it."""
    revision: str = ""
    """Which version of it, where it comes from a place that keeps several."""


class Policy(nn.Module, ABC):
    """A model that learns to act from demonstrations."""

    config: Any
    """Frozen dataclass of the family."""
    source: Source | None = None
    """Where its weights were read from; None for a policy that was built or merged."""
    attached: "Attached | None" = None
    """Data that came with its adapters; see `vlafit.nn.attached`."""
    compiled: bool = False
    """Whether its blocks are compiled, which changes the last bits; see `nn.compiled`."""
    quantised: str = ""
    """"int8" or "fp8": matrices were quantised for acting, which changes actions; `tuning.weights_8bit`."""
    steps: int | None = None
    """Steps in which `act` samples, for the caller to set; None: it does not sample in steps. Checkpoints
    keep a number that is not the family's."""

    @abstractmethod
    def parts(self) -> list[ParameterInfo]:
        """Describe every parameter exactly once, in the order of `named_parameters`."""

    @abstractmethod
    def needs(self) -> Needs:
        """Return what a codec for this policy must produce."""

    @abstractmethod
    def forward(self, batch: Batch, rng: SampleRng) -> dict[str, Tensor]:
        """Return the sum of each term of the loss, a float32 scalar; see `loss`."""

    @abstractmethod
    def act(self, batch: Batch, rng: SampleRng) -> Tensor:
        """Return actions [b, t, a], float, normalised and padded. Without gradients.

        Where `needs` says that it `writes_tokens`: int64 [b, m], of which the codec makes actions.
        """

    def probe(self, batch: Batch, rng: SampleRng) -> Tensor:
        """Return numbers that show how a change of the weights changes what the policy does: its actions."""
        return self.act(batch, rng)

    def measured(self) -> tuple[str, ...]:
        """Return the names of the figures that `measures` returns."""
        return ()

    def measures(self, batch: Batch) -> Sequence[tuple[Tensor, float]]:
        """Return further figures of a validation batch: the sum of each, and what it is divided by."""
        return ()

    def blocks(self) -> list[nn.Module]:
        """Return the layers that sharding gathers one at a time; each is only used through its own call.

        Without any, the whole policy is gathered at once.
        """
        return []

    def check(self, batch: Batch) -> None:
        """Raise CodecError naming the first field of `batch` that does not fit `needs`."""
        check_batch(batch, self.needs())

    def terms(self) -> Mapping[str, float]:
        """Return the terms of the loss and the coefficient of each."""
        return {ERROR: 1.0}

    def counts(self, batch: Batch, draws: int) -> dict[str, float]:
        """Count what the sum of each term is divided by: here, what the action mask leaves, in every draw.

        Called before the forward pass, on the CPU: the trainer adds the counts of all micro-batches and
        processes, so that the loss of a step is exact however its samples are spread.
        """
        if batch.action_mask is not None:
            return {ERROR: float(int(batch.action_mask.sum()) * draws)}
        return {ERROR: float(required_actions(batch).numel() * draws)}

    def drawn_counts(self, batch: Batch, rng: SampleRng) -> dict[str, float]:
        """Count as `counts` does, for the random numbers of a training step: they may leave something out."""
        return self.counts(batch, rng.draws)

    def tokens(self, batch: Batch, draws: int) -> int:
        """Count the tokens that a training step on a trimmed `batch` reads, with padding that is computed.

        It only measures speed; 0 where a family counts none.
        """
        return 0

    def packs(self) -> PrefixShape | None:
        """Return the shape of a prefix pass that takes packed rows (`Batch.packing`); None: it takes none."""
        return None

    def cacheable(self) -> Sequence[Cacheable]:
        """Return what can be kept while it is frozen, that which saves most first; empty: nothing.

        `forward` and `act` of a policy that returns any read `Batch.features`.
        """
        return ()

    def features(self, kind: str, batch: Batch) -> Features:
        """Compute the features of this kind of `cacheable` for a batch, without gradients."""
        raise NotImplementedError(f"{type(self).__name__} declares no features of the kind {kind!r}")

    @final
    def loss(self, batch: Batch, rng: SampleRng) -> dict[str, Tensor]:
        """Return the sum of each term of the loss over `batch`, which must hold actions.

        The keys are those of `terms`. The loss itself is the sum of coefficient * sum / count. With
        `rng.draws` above 1, every sum runs over the draws too.
        """
        return self(batch, rng)


def is_sampling_steps(value: object) -> bool:
    """Whether `value` is a number of steps in which a policy can sample."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_SAMPLING_STEPS


def mean_loss(terms: Mapping[str, float], sums: Mapping[str, float], counts: Mapping[str, float]) -> float:
    """Return the loss: the sum of coefficient * sum / count over the terms that count anything."""
    return sum(factor * (sums[name] / counts[name]) for name, factor in terms.items() if counts[name])


def required_actions(batch: Batch) -> Tensor:
    """Return the actions [b, t, a], 0 where they are masked and no numbers. Raises CodecError without any."""
    if batch.actions is None:
        raise CodecError("the batch has no actions: the loss needs those of the demonstration")
    if batch.action_mask is None:
        return batch.actions
    # What the loss leaves out is still seen by the other actions, but not if it is no number.
    return torch.where(batch.action_mask | batch.actions.isfinite(), batch.actions, 0.0)


def check_batch(batch: Batch, needs: Needs) -> None:
    """Raise CodecError naming the first field of `batch` that is not what a policy `needs`."""
    b = batch.images.shape[0]
    rows = (b,) if needs.history == 1 else (b, needs.history)
    if needs.history > 1 and batch.history_mask is None:
        raise CodecError(f"the batch has no history; this policy takes {needs.history} observation steps")
    n, size = batch.image_mask.shape[-1], needs.image_size
    if needs.cameras and n > needs.cameras:
        raise CodecError(f"batch.images has {n} cameras; this policy takes at most {needs.cameras}")
    wanted: dict[str, tuple[int, ...]] = {
        "images": (*rows, n, 3, size, size),
        "image_mask": (*rows, n),
        "state": (*rows, needs.state_dim),
        "history_mask": rows,
        "actions": (b, needs.chunk, needs.action_dim),
        "action_mask": (b, needs.chunk, needs.action_dim),
    }
    if needs.prompt is not None:
        length = batch.prompt()[0].shape[-1]
        wanted |= {"tokens": (b, length), "token_mask": (b, length)}
    for name, value in batch.present().items():
        if name in wanted and tuple(value.shape) != wanted[name]:
            raise CodecError(f"batch.{name} has shape {tuple(value.shape)}; this policy takes {wanted[name]}")
    if needs.prompt is not None and batch.images.device.type == "cpu":
        for name, tokens in (("tokens", batch.prompt()[0]), ("target_tokens", batch.target_tokens)):
            if tokens is None or not tokens.numel():
                continue
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= needs.vocabulary:
                raise CodecError(
                    f"batch.{name} reach from {low} to {high}; this policy knows 0 to {needs.vocabulary - 1}:"
                    " use the tokenizer that belongs to it"
                )
    ids = batch.embodiment_id
    if needs.embodiments and ids is not None and ids.device.type == "cpu" and len(ids):
        low, high, rows_used = int(ids.min()), int(ids.max()), needs.embodiment_rows
        reached = f"batch.embodiment_id reaches from {low} to {high}; "
        if rows_used and not 0 <= low <= high < len(rows_used):
            field = needs.embodiment_field
            raise CodecError(
                f"{reached}{field} of this policy's config is {list(rows_used)}: name one row for each "
                f"embodiment, such as policy.config.{field} = {list(range(10, 11 + high))}"
            )
        if low < 0 or high >= needs.embodiments:
            raise CodecError(f"{reached}this policy has weights for embodiments 0 to {needs.embodiments - 1}")
