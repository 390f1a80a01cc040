"""The settings of a codec, and whether they go together with robot, statistics and tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from vlafit.codec.action_bins import BINS, ActionBinConfig
from vlafit.codec.action_text import ActionTokenConfig
from vlafit.codec.columns import Columns
from vlafit.codec.images import MIDDLES, Framing
from vlafit.codec.normaliser import OPENVLA, MixedNormaliser, Normalisation, Normaliser
from vlafit.codec.prompts import FORMS, Prompt, holds_state
from vlafit.codec.statistics import Statistics
from vlafit.codec.tokenizer import Tokenizer
from vlafit.errors import CodecError
from vlafit.types import ColumnForm, Embodiment

AT_MOST = {
    "image_size": 2**13,
    "state_dim": 2**20,
    "action_dim": 2**20,
    "chunk": 2**13,
    "max_tokens": 2**15,
    "history": 2**10,
    "valid_steps": 2**13,
    "prompt_state": 2**10,
}
"""Largest sizes of a codec. Memory grows with each, so that a damaged one would take all of a machine's."""


@dataclass(frozen=True)
class CodecConfig:
    """How observations become a policy's inputs."""

    cameras: tuple[str, ...]
    """The policy's camera slots in order: names of the embodiment's cameras; empty: always missing."""
    image_size: int
    """Pixels of each side of the policy's images."""
    state_dim: int
    """Dimensions of the policy's state, S; the robot's are padded with zeros."""
    action_dim: int
    """Dimensions of the policy's actions, A; the robot's are padded with zeros."""
    chunk: int
    """Steps of an action chunk, t."""
    normalisation: Normalisation = "mean_std"
    """How states and actions are normalised."""
    action_normalisation: Normalisation | None = None
    """How actions are normalised, where it is not as states are."""
    relative: tuple[bool, ...] = ()
    """For each action dimension: whether it is minus the same dimension of the state at the chunk's start."""
    prompt: Prompt | None = "pi0"
    """The form of the prompt; None: the policy reads no instruction."""
    max_tokens: int = 48
    """Tokens of the prompt, l; a longer prompt is refused."""
    mask_padding: bool = True
    """Whether padded dimensions, and steps past the episode's end, are left out of the loss."""
    framing: Framing = "openpi"
    """How images get the policy's size."""
    crop: float = 0.0
    """Share of a side that is left of an image's middle, of framings that cut it out (GR00T's). 0: the usual
    one of the framing."""
    letter_box: bool = False
    """Whether those framings pad an image to a square before anything else."""
    special_tokens: Literal["prompt", "tokenizer"] = "prompt"
    """Who adds special tokens: the form of the prompt, or the tokenizer's own template (LeRobot)."""
    history: int = 1
    """Observation steps, o, the newest last; before an episode's start its first one is repeated."""
    action_tokens: ActionTokenConfig | None = None
    """How actions are written as tokens of a FAST tokenizer, to be learned; None: they are not."""
    action_bins: ActionBinConfig | None = None
    """How each value of an action is written as a token; None: it is not."""
    unchanged: tuple[bool, ...] = ()
    """For each action dimension: whether it is not normalised (OpenVLA's grippers). Empty: all are."""
    relative_to: tuple[int, ...] = ()
    """For each action dimension: which state dimension a relative one is minus. Empty: that of its number."""
    state_form: ColumnForm = field(default_factory=ColumnForm)
    """Poses and angles of the state, and what is learned of them; see `vlafit.codec.columns`."""
    action_form: ColumnForm = field(default_factory=ColumnForm)
    """Poses and grippers of an action."""
    state_methods: tuple[Normalisation, ...] = ()
    """How each learned dimension of the state is normalised, where that differs between them."""
    action_methods: tuple[Normalisation, ...] = ()
    """How each learned dimension of an action is normalised, where that differs between them."""
    prompt_state: int = 0
    """Numbers of the state in a prompt that holds it, zeros added at its end; 0: only the state's own."""
    valid_steps: int = 0
    """Steps of a chunk that were trained, the first ones; others are masked and not answered. 0: all."""

    @property
    def named_cameras(self) -> tuple[str, ...]:
        """The cameras that fill a slot, in order."""
        return tuple(name for name in self.cameras if name)

    @property
    def answered(self) -> int:
        """Steps of a decoded chunk."""
        return self.valid_steps or self.chunk

    @property
    def of_actions(self) -> Normalisation:
        """How actions are normalised."""
        return self.action_normalisation or self.normalisation

    @property
    def fate_of_invalid(self) -> str:
        """What becomes of answered tokens that are no chunk of actions."""
        if self.action_bins is not None:
            early = ", and 0 (normalised) for each value that is missing because the answer ended early"
            return f"an end of the range for each token that is no action{early * self.action_bins.ends}"
        fits = self.action_tokens is not None and self.action_tokens.fit
        return "cut or filled with zeros" if fits else "0 (normalised)"

    @property
    def begins_with_bos(self) -> bool:
        """True if the form of the prompt adds a beginning-of-sequence token."""
        return (
            self.special_tokens == "prompt" and self.prompt is not None and FORMS[self.prompt].begins_with_bos
        )


def columns_of(config: CodecConfig, robot: Embodiment) -> Columns:
    """Return what a codec learns of the robot's states and actions."""
    forms = config.state_form, config.action_form
    return Columns(robot, config.relative, *forms, config.relative_to)


def normaliser(
    config: CodecConfig, column: Literal["state", "action"], statistics: Statistics
) -> Normaliser | MixedNormaliser:
    """Return how a codec normalises what is learned of a column. Raises as `Normaliser.fit` does."""
    methods = config.state_methods if column == "state" else config.action_methods
    if methods:
        return MixedNormaliser.fit(statistics, methods)
    if column == "state":
        return Normaliser.fit(statistics, config.normalisation)
    return Normaliser.fit(statistics, config.of_actions, config.unchanged)


def require_consistent(
    config: CodecConfig,
    robot: Embodiment,
    columns: Columns,
    statistics: Mapping[str, Statistics],
    tokenizer: Tokenizer | None,
) -> None:
    """Raise CodecError or EmbodimentError where these do not belong together."""
    _require_inputs(config, robot, tokenizer)
    _require_dimensions(config, robot, columns, statistics)
    if config.prompt_state and not holds_state(config.prompt):
        raise CodecError("codec config: prompt_state would have no effect: the prompt holds no state")
    if 0 < config.prompt_state < columns.state_dimensions:
        raise CodecError(
            f"codec config: prompt_state is {config.prompt_state}, and the state has "
            f"{columns.state_dimensions} dimensions"
        )
    if not 0 <= config.valid_steps <= config.chunk:
        raise CodecError(f"codec config: valid_steps is {config.valid_steps}, and a chunk has {config.chunk}")
    bins = config.action_bins
    if bins is not None and bins.longest <= (count := config.chunk * columns.action_dimensions):
        raise CodecError(
            f"codec config: action_bins.longest is {bins.longest}; {count} values of a chunk and the end "
            f"need {count + 1}"
        )


def _require_inputs(config: CodecConfig, robot: Embodiment, tokenizer: Tokenizer | None) -> None:
    _require_framing(config, robot)
    named = config.named_cameras
    if len(set(named)) != len(named):
        raise CodecError(f"cameras {config.cameras}: a camera fills one slot only")
    least = {
        "image_size": 1,
        "state_dim": 0,
        "action_dim": 1,
        "chunk": 1,
        "history": 1,
        "max_tokens": 0 if config.prompt is None else 1,
    }
    for name, minimum in least.items():
        if getattr(config, name) < minimum:
            raise CodecError(f"codec config: {name} must be at least {minimum}, is {getattr(config, name)}")
    require_sizes(config, "codec config")
    if (config.prompt is None) != (tokenizer is None):
        has = "no tokenizer" if tokenizer is None else "a tokenizer"
        raise CodecError(f"codec config: prompt is {config.prompt!r}, and there is {has}")
    bins = config.action_bins
    if bins is not None and config.action_tokens is not None:
        raise CodecError("codec config: action_bins and action_tokens are both there; give one")
    if bins is not None and tokenizer is not None and tokenizer.vocab_size > bins.end:
        raise CodecError(
            f"the tokenizer has {tokenizer.vocab_size} tokens; the policy's actions are the last {BINS} of "
            f"{bins.end} (text_vocab), so it is not the policy's tokenizer"
        )
    if tokenizer is not None and config.begins_with_bos and tokenizer.bos is None:
        raise CodecError(f"prompt {config.prompt!r} begins with a bos token, and this tokenizer has none")


def require_sizes(config: CodecConfig, where: str) -> None:
    """Raise CodecError naming a size that no machine holds."""
    for name, most in AT_MOST.items():
        if getattr(config, name) > most:
            raise CodecError(f"{where}: {name} must be at most {most}, is {getattr(config, name)}")


def _require_framing(config: CodecConfig, robot: Embodiment) -> None:
    if not 0 <= config.crop <= 1:
        raise CodecError(f"codec config: crop is {config.crop}; it is a share of a side, from 0 to 1")
    if config.framing not in MIDDLES and (config.crop or config.letter_box):
        raise CodecError(
            f"codec config: crop and letter_box have no effect with the framing {config.framing!r}; only "
            f"{', '.join(MIDDLES)} have a crop"
        )
    for name in filter(None, config.cameras):
        height, width, _ = robot.camera(name).shape
        if config.framing == "nvidia_area" and not config.letter_box and height != width:
            raise CodecError(
                f"camera {name!r} has frames of {height}x{width}: this checkpoint keeps their aspect "
                "(use_albumentations), and a GR00T takes squares here. Fine-tuning with data.statistics = "
                '"data" pads them to squares, as NVIDIA\'s letter_box_transform does'
            )


def _require_dimensions(
    config: CodecConfig, robot: Embodiment, columns: Columns, statistics: Mapping[str, Statistics]
) -> None:
    if set(statistics) != {"state", "action"}:
        raise CodecError(f"statistics must be those of state and action, got {sorted(statistics)}")
    for name, have, room, methods, column in (
        ("state", columns.state_dimensions, config.state_dim, config.state_methods, robot.state),
        ("action", columns.action_dimensions, config.action_dim, config.action_methods, robot.action),
    ):
        if have > room:
            recorded = column.shape[0]
            learned = "" if recorded == have else f" (of the {recorded} that are recorded) to learn"
            raise CodecError(
                f"embodiment {robot.name!r} has {have} {name} dimensions{learned}, the policy takes {room}: "
                f"set policy.config.{name}_dim = {have} (and policy.resize where a checkpoint has fewer)"
            )
        if statistics[name].dimensions != have:
            raise CodecError(
                f"{name} statistics have {statistics[name].dimensions} dimensions, embodiment "
                f"{robot.name!r} has {have}; fit the codec on data of this embodiment"
            )
        if methods and len(methods) != have:
            raise CodecError(f"codec config: {name}_methods has {len(methods)} entries for {have} dimensions")
    steps = statistics["action"].steps
    if statistics["state"].steps or steps not in (0, config.answered):
        raise CodecError(
            f"the statistics are of {steps or statistics['state'].steps} steps, and {config.answered} of a "
            "chunk are answered; a state has one"
        )
    if config.unchanged and len(config.unchanged) != columns.action_dimensions:
        raise CodecError(
            f"unchanged has {len(config.unchanged)} entries for {columns.action_dimensions} action dimensions"
        )
    if any(config.unchanged) and config.of_actions not in OPENVLA:
        raise CodecError(
            f"codec config: unchanged has no effect with the normalisation {config.of_actions!r}; only "
            f"{' and '.join(OPENVLA)} leave dimensions as they are"
        )
