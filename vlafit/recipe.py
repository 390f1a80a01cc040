"""The schema of a recipe file: one experiment as frozen dataclasses.

A field's docstring is its help text on the command line. `vlafit.config` reads TOML into these classes.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from vlafit.errors import ConfigError


@dataclass(frozen=True)
class PolicyRecipe:
    """The policy to start from: a checkpoint, or a family with fresh weights."""

    checkpoint: str = ""
    """Checkpoint to fine-tune: a folder, or the name of a shipped one. Empty: train `family` from scratch."""
    base: str = ""
    """Where the base of `checkpoint` lies, or on --resume that of the run's own checkpoints, if it moved."""
    family: str = ""
    """Module of vlafit.policies (or a dotted path) that builds the policy if there is no checkpoint."""
    size: str = ""
    """Named size of the family; `config` changes single fields of it."""
    config: dict[str, object] = field(default_factory=dict)
    """Fields of the family's config that differ from `size` (or from the checkpoint's config)."""
    fresh: tuple[str, ...] = ()
    """Parts (or name patterns) that get fresh weights instead of the checkpoint's. `embodiment:N`: those of
    embodiment N, in a policy that has weights for each."""
    resize: Literal["refuse", "keep", "fresh"] = "refuse"
    """How to treat projections if `config` changes the checkpoint's action_dim or state_dim."""
    assets: str = ""
    """Name of the checkpoint's statistics to use: openpi's asset, LeRobot's dataset. Empty: the only one."""
    embodiment: str = ""
    """Embodiment of a checkpoint of several whose statistics and cameras count for a robot that it does not
    have by name. Empty: the only one."""
    trust: tuple[str, ...] = ()
    """Packages whose module may be imported as the checkpoint's policy family; it runs their code."""
    tokenizer: str = ""
    """Tokenizer if the checkpoint has none: a folder, a tokenizer.json, SentencePiece's .model, an id of the
    Hub, or a shipped one's name. Empty: learned from the data where the language model is fresh, else an
    error."""
    action_tokenizer: str = ""
    """FAST action tokenizer of a policy that writes actions as tokens, if the checkpoint has none: a folder,
    or an id of the Hub. fit: one that is fitted to the data, in place of the checkpoint's, too, whose weights
    then learn anew what a token means. Empty: the checkpoint's, or fitted, where the weights are fresh."""


@dataclass(frozen=True)
class DataRecipe:
    """The demonstrations."""

    cards: tuple[str, ...] = ()
    """Data cards: paths, or names of shipped cards."""
    weights: dict[str, float] = field(default_factory=dict)
    """Share of the samples that each dataset gives: name of the card (or of `vision_language`) = weight, for
    all of them; the sum does not matter. Empty: every sample once in an epoch."""
    embodiments: dict[str, str] = field(default_factory=dict)
    """For several robots in one run: name of the card = name of the robot's embodiment, for every card. Each
    embodiment has its own statistics and cameras. Empty: all cards show one robot."""
    validation: float = 0.1
    """Share of each task's episodes that is held out for validation."""
    episodes_per_task: int = 0
    """Maximum number of training episodes of each task. 0: all."""
    statistics: Literal["checkpoint", "data", "file"] = "checkpoint"
    """Normalisation statistics: the checkpoint's, computed from the training episodes, or those that a
    LeRobot dataset's own file states of all its rows, which are compared with the rows first."""
    statistics_from: str = ""
    """Card, folder or hub id of another dataset of the same robot, whose episodes, all of them, give the
    statistics; with statistics = "data". Empty: the training episodes."""
    normalisation: Literal[
        "",
        "mean_std",
        "quantile",
        "groot_min_max",
        "groot_quantile",
        "openvla_min_max",
        "openvla_quantile",
        "identity",
    ] = ""
    """How computed statistics normalise states and actions. Empty: the checkpoint's method, else the
    family's: mean_std, or for GR00T groot_min_max, the range clipped to [-1, 1], and for OpenVLA
    openvla_quantile. identity: neither is normalised, as X-VLA's spaces of poses and joints want it."""
    relative: Literal["card", "matching"] = "card"
    """Which actions are learned minus the state at the chunk's start. card: those of the card's
    robot.relative (without a card: none). matching: each that has the name of a state (absolute joint
    targets); one whose state stands at another place is refused."""
    mixed_files: int = 0
    """How many files' samples are shuffled together, and then those of the next; which, is drawn for each
    epoch. 0: all samples. For a dataset at a URL that is larger than the cache."""
    shift_pixels: int = 0
    """Augmentation: shift each training image by up to this many pixels, repeating the edges."""
    workers: int | Literal["auto"] = "auto"
    """Dataloader workers. 0: load in the training process. auto: on a GPU up to 4, as cores and shared memory
    allow; else 0."""
    vision_language: dict[str, str] = field(default_factory=dict)
    """Questions about images with their answers: name = a .jsonl or .json file. They train image tower and
    language model by the token loss, beside the demonstrations, by `weights`; `validation` holds some out."""
    validation_sets: dict[str, str | tuple[str, ...]] = field(default_factory=dict)
    """Datasets only for validation: name = data card or cards; logged as validation/NAME/loss."""


@dataclass(frozen=True)
class AdaptRecipe:
    """Differences between dataset and checkpoint that are intended; every other difference is an error."""

    cameras: dict[str, str] = field(default_factory=dict)
    """Checkpoint camera = dataset camera that takes its place. Empty text leaves that camera out."""
    resize: bool = False
    """Whether frames may have another size or shape than those the checkpoint was trained on."""
    frames: bool = False
    """Whether frames may be turned or flipped otherwise than the checkpoint's were when they were read."""
    conversion: bool = False
    """Whether `scale`, `offset` and `action_shift` of a card may differ from those of the checkpoint's."""
    robot: bool = False
    """Whether the dataset may show another robot: dimensions, names, units, control mode and rate."""
    actions: Literal["", "checkpoint", "data"] = ""
    """Which side says what is relative in an action, where they differ. "data" needs fresh statistics."""
    outside: tuple[str, ...] = ()
    """State and action dimensions whose normalised values may be extreme: `state.3`, `action.gripper`."""
    embodiments: dict[str, "AdaptRecipe"] = field(default_factory=dict)
    """For several robots in one run: embodiment = a table of these keys, in place of those above. Without a
    checkpoint, `cameras` says which slot (by another embodiment's camera) takes a camera."""

    def of(self, embodiment: str) -> "AdaptRecipe":
        """Return what holds for one embodiment: its own table, or the keys outside of such tables."""
        return self.embodiments.get(embodiment, replace(self, embodiments={}))


@dataclass(frozen=True)
class OptimRecipe:
    """The optimiser and its schedule."""

    lr: float = 2.5e-5
    """Peak learning rate."""
    schedule: Literal["cosine", "step"] = "cosine"
    """How the learning rate falls after the warm-up: along a cosine, or at once after `schedule_steps`."""
    final_lr: float = 0.1
    """Learning rate at the end, as a share of the peak. 1: it stays as it is after the warm-up."""
    warmup_steps: int = 100
    """Optimiser steps of linear warm-up."""
    schedule_steps: int = 0
    """Optimiser steps of warm-up and decay; then the rate stays at its end. 0: all of the run."""
    schedule_from: int = 0
    """Step at which the schedule begins: with --resume and more train.steps, a new one for what is added."""
    beta1: float = 0.9
    """AdamW beta 1."""
    beta2: float = 0.95
    """AdamW beta 2."""
    eps: float = 1e-8
    """AdamW epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only."""
    clip_norm: float = 1.0
    """Maximum norm of the whole gradient, or with `in_backward` of each tensor's. 0: no clipping."""
    ema: float = 0.0
    """Decay of the EMA of the trainable weights. 0: no EMA."""
    states: Literal["auto", "fp32", "8bit", "cpu"] = "auto"
    """How AdamW keeps its moments; 8bit takes a quarter, cpu keeps those of fp32 in the host's memory, at the
    price of moving them in every step. auto: what train.memory picks, or fp32."""
    in_backward: bool | Literal["auto"] = "auto"
    """Step each tensor in the backward pass and free its gradient at once; `clip_norm` then holds for each
    tensor. One process, no accumulation. auto: what train.memory picks, or false."""


@dataclass(frozen=True)
class TrainRecipe:
    """The training loop."""

    steps: int = 1000
    """Optimiser steps."""
    max_seconds: float = 0.0
    """Maximum training time in seconds; the learning-rate schedule adapts. 0: no limit."""
    batch_size: int | Literal["auto"] = 32
    """Samples in one optimiser step, over all processes and accumulation steps. auto: as many as fit the
    device by the forecast, or the free RAM of a CPU, up to 256; chosen once and kept."""
    accumulate: int = 0
    """Micro-batches of each process in one optimiser step. 0: the launcher's, or 1."""
    draws: int = 1
    """(noise, time) draws for each sample; they share one pass over images and prompt."""
    max_delay: int = 0
    """Training-time real-time chunking: each draw gives the first 0 to this many steps of its chunk clean, as
    executed already. For pi0, pi0.5 and SmolVLA; 0: none."""
    seed: int = 0
    """Seed of initial weights, sample order, augmentation and noise."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute precision. auto: bf16 on a GPU that has it, else fp32."""
    weights: Literal["auto", "fp32", "bf16"] = "auto"
    """How matrices that are trained are kept; bf16 takes half, rounds each update stochastically, and needs
    `precision` bf16. Norms, biases, projections and adapters stay fp32. auto: what train.memory picks, or
    fp32."""
    frozen: Literal["auto", "fp32", "bf16"] = "auto"
    """How weights that no stage trains are kept; norms and projections in fp32. auto: as train.precision."""
    sharding: Literal["auto", "none", "gradients", "full"] = "auto"
    """On several processes: a copy on each (none: DDP); gradients and AdamW's moments sharded; or weights,
    too (full). auto: the launcher's, or none."""
    replicas: int = 0
    """Copies of a sharded policy (hybrid sharding, HSDP): each is sharded over processes / replicas, whose
    ranks follow one another, such as those of a machine. 0: the launcher's, or 1: sharded over all."""
    recompute: Literal["auto", "none", "selective", "full"] = "auto"
    """Recompute activations in the backward pass: what lies between matrix products (selective), or whole
    blocks (full). Less memory, the same numbers. auto: what train.memory picks, or none."""
    compile: Literal["auto", "none", "blocks"] = "auto"
    """Compile each block of the policy by torch.compile: faster steps after a minute or more of compiling,
    and other last bits. auto: none."""
    packing: Literal["auto", "none", "rows"] = "auto"
    """How batches of rows with missing cameras or short prompts are computed: padded to the longest (none),
    or row after row without padding (rows), where that leaves out a sixteenth or more; other last bits. For
    pi0, pi0.5, pi0-FAST and SmolVLA. auto: rows, or none with compile."""
    cache: str = "off"
    """Where features of what no stage trains are kept, so that they are computed once for each sample: memory
    (of each process), or a folder, which processes and runs share. off: nowhere."""
    memory: str = ""
    """Memory to fit into, such as 24GB: picks recompute, optim.states, accumulate, and where it must weights
    and optim.in_backward. Empty: refuse what the GPU has no room for. ignore: start whatever the forecast
    says."""
    peak_tflops: float = 0.0
    """Peak of one device in TFLOP/s, for train/mfu. 0: that of a known GPU in bf16; others log none."""
    log_every: int = 10
    """Steps between logged metrics."""
    validate_every: int = 200
    """Steps between validations. 0: only at the end."""
    validation_batches: int = 8
    """Samples in one validation, in groups of 32 whatever the batch size, so that losses compare."""
    save_every: int = 500
    """Steps between checkpoints."""
    checkpoints: Literal["auto", "trained", "whole"] = "auto"
    """Weights in checkpoints: what the run trains, on its base by hash (trained), or all (whole). auto:
    trained, unless the base is another run's checkpoint, which may be deleted. Adapters sit on any base."""
    keep: int = 2
    """Checkpoints to keep in addition to the best and the last."""
    keep_best: bool = True
    """Keep the checkpoint with the lowest validation loss, too."""
    threads: int = 0
    """CPU threads of each process. 0: torch's default."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Trackers of accelerate in addition to metrics.jsonl: tensorboard, wandb, trackio or another."""
    report: bool = True
    """Write report.html at the end. `vlafit report RUN` writes it at any time."""

    @property
    def samples(self) -> int:
        """Samples in one optimiser step. Raises ConfigError where `batch_size` is still automatic."""
        if self.batch_size == "auto":
            raise ConfigError('train.batch_size = "auto" needs a number here, which `vlafit train` chooses')
        return self.batch_size

    @property
    def micro_batches(self) -> int:
        """Micro-batches of each process in one optimiser step, also where `accumulate` is automatic."""
        return self.accumulate or 1

    @property
    def shards(self) -> bool:
        """Whether gradients and optimiser states are sharded over the processes."""
        return self.sharding in ("gradients", "full")


@dataclass(frozen=True)
class EvalRecipe:
    """Closed-loop evaluations that are part of the run."""

    protocol: str = ""
    """Protocol: a path, or the name of a shipped one. Empty: no rollouts."""
    embodiment: str = ""
    """Embodiment that is evaluated, if the policy learns several."""
    before: bool = False
    """Evaluate before training, too."""
    after: bool = True
    """Evaluate after training."""
    every: int = 0
    """Steps between evaluations while training. 0: none."""
    every_trials: int = 5
    """Episodes of each task in evaluations while training."""
    wrong_instruction: bool = False
    """After training, also evaluate with the protocol's swapped instructions."""
    workers: int = 0
    """Environment processes. 0: one per CPU core."""
    videos: int = 2
    """Episodes of each task to record as videos."""
    samples: int = 16
    """Without a protocol: observations of held-out episodes for the report's comparison. 0: none."""

    @property
    def controls(self) -> bool:
        """Whether the control with swapped instructions is played: beside the evaluation after training."""
        return self.after and self.wrong_instruction


@dataclass(frozen=True)
class Recipe:
    """One experiment."""

    name: str = "run"
    """Name of the run; its folder is runs/NAME."""
    purpose: str = ""
    """One sentence for the report."""
    policy: PolicyRecipe = field(default_factory=PolicyRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    adapt: AdaptRecipe = field(default_factory=AdaptRecipe)
    strategy: str = "full"
    """Tuning strategy: the name of a shipped one, or a path."""
    optim: OptimRecipe = field(default_factory=OptimRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)
    eval: EvalRecipe = field(default_factory=EvalRecipe)

    @property
    def fits_statistics(self) -> bool:
        """Whether normalisation statistics are fitted to the dataset, not taken from the checkpoint."""
        return not self.policy.checkpoint or self.data.statistics != "checkpoint"

    def of(self, embodiment: str) -> "Recipe":
        """Return the recipe with the adaptations of one embodiment."""
        return replace(self, adapt=self.adapt.of(embodiment))
