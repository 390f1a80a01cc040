"""What a recipe file may say: the whole experiment as frozen values.

A field's docstring is its help text on the command line. How TOML becomes these values is `vlafit.config`.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class PolicyRecipe:
    """The policy to start from: a checkpoint, or an architecture with fresh weights."""

    checkpoint: str = ""
    """Checkpoint to fine-tune: a folder, or one that ships by name. Empty: train `family` from scratch."""
    family: str = ""
    """Module of vlafit.policies (or a dotted path) that builds the policy when there is no checkpoint."""
    size: str = ""
    """Named size of the family, the start for `config`."""
    config: dict[str, object] = field(default_factory=dict)
    """Fields of the family's config that differ from `size` (or from the checkpoint's)."""
    fresh: tuple[str, ...] = ()
    """Parts (or name patterns) that start from fresh weights although a checkpoint is given."""
    resize: Literal["refuse", "keep", "fresh"] = "refuse"
    """What becomes of projections where `config` gives the checkpoint another action_dim or state_dim."""
    assets: str = ""
    """Which of an openpi checkpoint's statistics to use: an asset's name. Empty: the only one."""
    tokenizer: str = ""
    """Tokenizer, where the checkpoint has none: a folder, or one that ships by name. Empty: from the data."""


@dataclass(frozen=True)
class DataRecipe:
    """The demonstrations."""

    cards: tuple[str, ...] = ()
    """Data cards: paths, or names of cards that ship."""
    validation: float = 0.1
    """Share of each task's episodes that is held out for validation."""
    episodes_per_task: int = 0
    """Use only so many training episodes of each task. 0: all."""
    statistics: Literal["checkpoint", "data"] = "checkpoint"
    """Whose normalisation to use: the checkpoint's, or fresh from the training episodes."""
    normalisation: Literal["", "mean_std", "quantile"] = ""
    """How fresh statistics normalise states and actions. Empty: as the checkpoint does; else mean_std."""
    shift_pixels: int = 0
    """Augmentation: each training image is moved by up to so many pixels, edges repeated."""
    workers: int = 0
    """Loader processes. 0: load in the training process."""
    validation_sets: dict[str, str | tuple[str, ...]] = field(default_factory=dict)
    """More to validate on, never to train on: name = data card or cards; logged as validation/NAME/loss."""


@dataclass(frozen=True)
class OptimRecipe:
    """The optimiser and its schedule."""

    lr: float = 2.5e-5
    """Peak learning rate."""
    final_lr: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    warmup_steps: int = 100
    """Optimiser steps of linear warm-up."""
    beta1: float = 0.9
    """AdamW beta 1."""
    beta2: float = 0.95
    """AdamW beta 2."""
    eps: float = 1e-8
    """AdamW epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient. 0: no clipping."""
    ema: float = 0.0
    """Decay of the moving average of the trainable weights. 0: none."""


@dataclass(frozen=True)
class TrainRecipe:
    """The training loop."""

    steps: int = 1000
    """Optimiser steps."""
    max_seconds: float = 0.0
    """End after so many seconds of training, if `steps` take longer; the schedule follows. 0: no limit."""
    batch_size: int = 32
    """Samples in one optimiser step, over all processes and accumulation steps."""
    accumulate: int = 1
    """Micro-batches that one process runs for one optimiser step."""
    draws: int = 1
    """(noise, time) draws for each sample; they share one pass over images and prompt."""
    seed: int = 0
    """Decides initial weights, order, augmentation, noise and time."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Compute precision; master weights stay fp32."""
    sharding: Literal["none", "full"] = "none"
    """How several processes hold the weights: each a copy (DDP), or sharded (FSDP2)."""
    log_every: int = 10
    """Steps between logged metrics."""
    validate_every: int = 200
    """Steps between validations. 0: at the end alone."""
    validation_batches: int = 8
    """Batches in one validation."""
    save_every: int = 500
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints to keep beside the best and the last."""
    keep_best: bool = True
    """Keep the checkpoint of the lowest validation loss, too."""
    threads: int = 0
    """CPU threads of each process. 0: torch's own choice."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Trackers of accelerate beside metrics.jsonl."""


@dataclass(frozen=True)
class EvalRecipe:
    """Closed-loop evaluation that belongs to the run."""

    protocol: str = ""
    """Protocol: a path, or the name of one that ships. Empty: no rollouts."""
    before: bool = False
    """Evaluate before training, too."""
    after: bool = True
    """Evaluate after training."""
    every: int = 0
    """Steps between evaluations while training. 0: none."""
    every_trials: int = 5
    """Episodes of each task in evaluations while training."""
    wrong_instruction: bool = False
    """After training, evaluate with the protocol's swapped instructions, too."""
    workers: int = 0
    """Environment processes. 0: one for each CPU core."""
    videos: int = 2
    """Episodes of each task that are filmed."""


@dataclass(frozen=True)
class Recipe:
    """One experiment."""

    name: str = "run"
    """Name of the run; its folder is runs/NAME."""
    purpose: str = ""
    """One sentence for the report."""
    policy: PolicyRecipe = field(default_factory=PolicyRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    strategy: str = "full"
    """Tuning strategy: the name of one that ships, or a path."""
    optim: OptimRecipe = field(default_factory=OptimRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)
    eval: EvalRecipe = field(default_factory=EvalRecipe)
