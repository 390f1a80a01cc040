"""How action chunks become actions: open loop, temporal ensembling, real-time chunking; and limits of joints.

Rollouts, the server and the robot's control loop execute chunks by the same code. A plan knows nothing of
clocks: its unit is the control step. Nothing here imports torch; how a flow policy is guided lives in
`vlafit.nn.guidance`.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from vlafit import arguments
from vlafit.errors import ConfigError, EmbodimentError
from vlafit.observations import as_numbers, short
from vlafit.types import ActionChunk, Committed, Embodiment, Guidance, Prefix, Schedule

Mode = Literal["chunk", "ensemble", "real_time"]
MOST_STEPS = 10**6  # of one chunk
MOST_DECAY = 1e6
STRONGEST = 1e6  # weight of a guidance: beyond it float32 holds nothing of the policy's own velocity
NO_CHUNK = "the policy's tokens make no chunk of actions"
OnViolation = Literal["clip", "stop"]


@dataclass(frozen=True)
class Execution:
    """How the chunks of a policy are executed."""

    mode: Mode = "chunk"
    """chunk: the newest chunk counts. ensemble: the average of all chunks that cover a step (ACT, algorithm
    2). real_time: the newest chunk counts, and continues the one before it (real-time chunking)."""
    replan: int = 8
    """Steps that are executed before the policy is asked again."""
    delay: int = 0
    """Control steps from an observation until its chunk can be executed; meanwhile the chunk before it is.
    In the background a Controller measures it, and at first expects this; 0: what the first answer took."""
    decay: float = 0.01
    """ensemble: weights are exp(-decay * i), i = 0 for the oldest chunk that covers the step (ACT's 0.01).
    Below 0 the newest counts most."""
    guidance: Guidance = field(default_factory=Guidance)
    """real_time: how strongly a new chunk is held to the old one."""

    def __post_init__(self) -> None:
        """Raise ConfigError naming the argument, its value and what is allowed."""
        checked = {
            "mode": arguments.one_of("execution: mode", self.mode, get_args(Mode)),
            "replan": arguments.whole("execution: replan", self.replan, 1, MOST_STEPS),
            "delay": arguments.whole("execution: delay", self.delay, 0, MOST_STEPS),
            "decay": arguments.number("execution: decay", self.decay, -MOST_DECAY, MOST_DECAY),
            "guidance": checked_guidance("execution: guidance", self.guidance),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # Python's own numbers for numpy's

    def shortened(self, steps: int) -> str:
        """Return what follows from chunks of `steps` steps that are shorter than `replan`; "" from others."""
        if not 0 < steps < self.replan:
            return ""
        return (
            f"a chunk has {steps} steps, so the policy is asked again after {steps}, not after replan = "
            f"{self.replan}"
        )

    def require_chunk(self, steps: int) -> None:
        """Raise ConfigError unless chunks of `steps` steps last until the next one can be executed."""
        if self.delay and steps < self.replan + self.delay:
            raise ConfigError(
                f"execution: a chunk has {steps} steps, and {self.replan} (replan) + {self.delay} (delay) "
                "are executed before the next one is there; ask again after at most "
                f"{max(1, steps - self.delay)} steps"
            )


class Plan:
    """The chunks of one episode and the step that it is at.

    Each round: ask the policy with the observation of this step (`committed` says what its chunk has to
    continue), then `extend` with the chunk, which returns the actions to execute until the next round.
    """

    def __init__(self, execution: Execution) -> None:
        self.execution = execution
        self.step = 0
        self._chunks: list[tuple[int, int, NDArray[np.float32]]] = []  # first step, first usable step, [t, a]

    def committed(self, delay: int | None = None) -> Committed | None:
        """Return what is left of the chunk that is being executed; None where a new one continues nothing.

        `delay` is how many steps from now the new chunk is expected; the execution's own unless given.
        """
        if self.execution.mode != "real_time" or not self._chunks:
            return None
        first, usable, actions = self._chunks[-1]
        left = actions[self.step - first :]
        if not len(left):
            return None
        # Until the newest chunk begins, an older one is executed.
        before = [self._covering(step)[-1] for step in range(self.step, usable)]
        left = np.concatenate([before, left[len(before) :]]) if before else left
        delay = min(self.execution.delay if delay is None else delay, len(left))
        # The weights end where the new chunk's last `replan` steps begin: H - s in the paper, equation 5.
        end = max(delay, min(len(left), len(actions) - self.execution.replan))
        return Committed(left, delay, end, self.execution.guidance)

    def extend(self, chunk: ActionChunk) -> NDArray[np.float32]:
        """Take the chunk for the observation of this step; return the actions [k, a] until the next round.

        k is the replan interval, or less where the chunk is shorter.
        """
        self.add(chunk, self.step, self.execution.delay if self._chunks else 0)
        count = min(self.execution.replan, self.left())
        return np.stack([self.next() for _ in range(count)])

    def add(self, chunk: ActionChunk, observed: int, delay: int) -> None:
        """Take a chunk for the observation of step `observed`, usable `delay` steps after it."""
        actions = np.array(chunk.actions, np.float32)  # a copy: the actor may use its array again
        if actions.ndim != 2 or not len(actions):
            raise ConfigError(f"a chunk must be actions [steps, dimensions], not of shape {actions.shape}")
        self.execution.require_chunk(len(actions))
        self._chunks.append((observed, observed + delay, actions))

    def left(self) -> int:
        """Return for how many steps from now there are actions."""
        last = max((first + len(actions) for first, _, actions in self._chunks), default=self.step)
        return max(0, last - self.step)

    def next(self) -> NDArray[np.float32]:
        """Return the action [a] of this step, and go one step on."""
        covering = self._covering(self.step)
        if not covering:
            raise ConfigError(
                f"step {self.step}: every chunk is executed; ask the policy before the plan ends"
            )
        action = covering[-1] if self.execution.mode != "ensemble" else self._average(covering)
        self.step += 1
        self._chunks = [c for i, c in enumerate(self._chunks) if self._is_needed(i)]
        return action

    def _covering(self, step: int) -> list[NDArray[np.float32]]:
        """Return the action that each chunk has for a step, oldest first."""
        return [
            actions[step - first]
            for first, usable, actions in self._chunks
            if usable <= step < first + len(actions)
        ]

    def _average(self, covering: list[NDArray[np.float32]]) -> NDArray[np.float32]:
        powers = -self.execution.decay * np.arange(len(covering))
        weights = np.exp(powers - powers.max())  # of the same ratios, and never infinite
        return (np.stack(covering).T.astype(np.float64) @ (weights / weights.sum())).astype(np.float32)

    def _is_needed(self, i: int) -> bool:
        first, _, actions = self._chunks[i]
        if i == len(self._chunks) - 1:
            return True
        replaced = self.execution.mode != "ensemble" and self._chunks[i + 1][1] <= self.step
        return self.step < first + len(actions) and not replaced


def executable(actions: Any, dimensions: int) -> NDArray[np.float32]:
    """Return the actions of a chunk as float32 [t, dimensions]. Raises EmbodimentError for what no robot may
    be sent.

    What is checked is the float32 copy, because that is what is sent.
    """
    problems: list[str] = []
    numbers = as_numbers("the policy's actions", actions, problems)
    if numbers is None:
        raise EmbodimentError(problems[0])
    if numbers.ndim != 2 or not len(numbers) or numbers.shape[1] != dimensions:
        raise EmbodimentError(
            f"the policy's actions have shape {numbers.shape}; a chunk is [steps, {dimensions}], with at "
            "least one step"
        )
    with np.errstate(over="ignore"):  # a double beyond float32 becomes infinite, and is refused
        narrow = numbers.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(narrow).all(axis=1))
    if len(bad):
        row = numbers[bad[0]]
        what = "beyond float32" if np.isfinite(row).all() else "not finite"
        raise EmbodimentError(f"the action is {what}: {row.tolist()}, step {bad[0]} of the chunk")
    return narrow


class InvalidAnswers:
    """Counts the answers of a policy that writes tokens, and those that make no chunk of actions."""

    def __init__(self) -> None:
        self.answers = self.invalid = 0

    def sentence(self, chunk: ActionChunk, fate: str) -> str:
        """Count a chunk; return a sentence about one that is none, "" for others. `fate` is what is executed
        then."""
        self.answers += chunk.valid is not None
        if chunk.valid is not False:
            return ""
        self.invalid += 1
        return (
            f"{NO_CHUNK} in {self.invalid} of {self.answers} answers; what is executed is "
            f"{fate or 'decided by the server'}"
        )

    @property
    def has_doubled(self) -> bool:
        """Whether the number of invalid ones is a power of two: 1, 2, 4 and so on are worth a line."""
        return self.invalid & (self.invalid - 1) == 0


@dataclass(frozen=True)
class Limits:
    """The robot's limits: the range of each action dimension, and how far it may move in one step.

    `low`, `high` and `change` are float [a]; infinite where there is no limit. What an action outside them
    does is decided by `on_violation`: clip brings it to the nearest that is permitted, stop raises.
    """

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    change: NDArray[np.float64]
    labels: tuple[str, ...] = ()
    on_violation: OnViolation = "clip"

    def __post_init__(self) -> None:
        """Raise ConfigError for limits that limit nothing, or that no action can keep."""
        arguments.one_of("limits: on_violation", self.on_violation, get_args(OnViolation))
        for name in ("low", "high", "change"):
            problems: list[str] = []
            values = as_numbers(f"limits: {name}", getattr(self, name), problems)
            if values is None:
                raise ConfigError("; ".join(problems))
            if values.ndim != 1 or np.isnan(values).any():
                raise ConfigError(
                    f"limits: {name} must be a number for each dimension, not {values.tolist()}"
                )
            object.__setattr__(self, name, np.array(values, np.float64))  # a copy
        if not len(self.low) == len(self.high) == len(self.change):
            counts = f"{len(self.low)}, {len(self.high)} and {len(self.change)}"
            raise ConfigError(
                f"limits: low, high and change have {counts} values; each dimension needs all three"
            )
        if (self.low > self.high).any():
            raise ConfigError(f"limits: low {self.low.tolist()} is above high {self.high.tolist()}")
        largest = float(np.finfo(np.float32).max)  # actions are float32
        if (self.low > largest).any() or (self.high < -largest).any():
            raise ConfigError(
                f"limits: no action is from {self.low.tolist()} (low) to {self.high.tolist()} (high)"
            )
        if not np.isfinite([self.low, self.high, self.change]).any():
            raise ConfigError("limits: low, high and change are all infinite, so that they limit nothing")
        if (self.change < 0).any():
            raise ConfigError(f"limits: change must be 0 or more, not {self.change.tolist()}")
        labels = arguments.texts("limits: labels", self.labels)
        if labels and len(labels) != len(self.low):
            raise ConfigError(
                f"limits: labels has {len(labels)} names for {len(self.low)} dimensions; name each, or none"
            )
        object.__setattr__(self, "labels", labels)

    @classmethod
    def of(
        cls, embodiment: Embodiment, on_violation: OnViolation = "clip", change: float | None = None
    ) -> "Limits":
        """Return the limits that the embodiment declares; `change` limits the step of every dimension.

        Raises EmbodimentError where there are none: limits that limit nothing would only seem safe.
        """
        if not isinstance(embodiment, Embodiment):
            raise ConfigError(
                f"limits: embodiment must be a vlafit.types.Embodiment (policy.embodiment), not "
                f"{short(embodiment)}"
            )
        if change not in (None, float("inf")):
            change = arguments.number("limits: change", change, 0, np.finfo(np.float64).max)
        action, dimensions = embodiment.action, embodiment.action.shape[0]
        if not action.low and not action.high and change in (None, float("inf")):
            raise EmbodimentError(
                f"embodiment {embodiment.name!r} declares no limits of its actions; give "
                "Limits(low, high, change), or declare low and high for the action in the data card"
            )
        for name in ("low", "high"):
            values = getattr(action, name)
            if values and len(values) != dimensions:
                raise EmbodimentError(
                    f"embodiment {embodiment.name!r}: action.{name} has {len(values)} values "
                    f"for {dimensions} dimensions"
                )
        return cls(
            np.array(action.low or [-np.inf] * dimensions),
            np.array(action.high or [np.inf] * dimensions),
            np.full(dimensions, np.inf if change is None else change),
            action.labels,
            on_violation,
        )

    def apply(self, action: NDArray[np.float32], before: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """Return the action [a] that may be sent, `before` being the one that was sent last (None: none was).

        NaN always raises EmbodimentError, and so does a violation where the limits say stop.
        """
        if not np.isfinite(action).all():
            raise EmbodimentError(f"stopped: the action is not finite: {action.tolist()}")
        if action.shape != self.low.shape:
            raise EmbodimentError(f"stopped: an action of shape {action.shape}, and {len(self.low)} limits")
        low, high = self.low, self.high
        if before is not None:
            # The step's limit is that which holds where `before` is outside of the range.
            least, most = before - self.change, before + self.change
            low, high = np.clip(low, least, most), np.clip(high, least, most)
        allowed = _inside(action, low, high)
        if before is not None:
            too_far = np.abs(allowed - before.astype(np.float64)) > self.change  # by the rounding of a bound
            allowed = np.where(too_far, np.nextafter(allowed, before, dtype=np.float32), allowed)
        # A value that is a bound's nearest float32 is on it, and not outside.
        outside = np.flatnonzero(np.clip(action, low, high).astype(np.float32) != action)
        if len(outside) and self.on_violation == "stop":
            listed = "; ".join(
                "{} {}, permitted from {} to {}".format(
                    self.labels[i] if self.labels else f"dimension {i}",
                    *_shown(float(action[i]), float(low[i]), float(high[i])),
                )
                for i in outside
            )
            raise EmbodimentError(f"stopped: the action is outside the limits: {listed}")
        return allowed


def _inside(
    action: NDArray[np.float32], low: NDArray[np.float64], high: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Return the nearest float32 that is not beyond the bounds; the bound's nearest where none is between."""
    near = np.clip(action, low, high).astype(np.float32)
    inward = np.where(near > high, np.nextafter(near, np.float32(-np.inf)), near)
    inward = np.where(near < low, np.nextafter(near, np.float32(np.inf)), inward)
    return np.where((inward < low) | (inward > high), near, inward)


def _shown(*values: float) -> list[str]:
    """Return numbers to six digits of the largest: the rounding of a float32 near zero is shown as zero."""
    largest = max((abs(value) for value in values if np.isfinite(value)), default=0.0)
    decimals = 5 - int(np.floor(np.log10(largest))) if largest else 0
    return [f"{round(value, decimals) + 0.0:.6g}" if np.isfinite(value) else str(value) for value in values]


def checked_guidance(where: str, guidance: object) -> Guidance:
    """Return a guidance with Python's own values, or raise ConfigError naming the field."""
    if not isinstance(guidance, Guidance):
        raise ConfigError(f"{where} must be a vlafit.types.Guidance, not {short(guidance)}")
    arguments.one_of(f"{where}.schedule", guidance.schedule, get_args(Schedule))
    arguments.one_of(f"{where}.prefix", guidance.prefix, get_args(Prefix))
    return dataclasses.replace(
        guidance,
        max_weight=arguments.number(f"{where}.max_weight", guidance.max_weight, 0, STRONGEST, above=True),
        jacobian=arguments.flag(f"{where}.jacobian", guidance.jacobian),
    )


def with_replan(execution: Execution, replan: int) -> Execution:
    """Return the execution with another replan interval."""
    return dataclasses.replace(execution, replan=replan)
