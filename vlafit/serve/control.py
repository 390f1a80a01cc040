"""The control loop of a robot: an observation in, the next action out, whatever actor decides it.

    policy = vlafit.connect("ws://gpu-machine:8000", token=...)
    control = vlafit.Controller(policy, vlafit.Execution("real_time", replan=8), background=True)
    control.start("pick up the cube")
    while True:
        robot.send(control.step(robot.images(), robot.joints()))

Nothing here keeps time: call `step` at the robot's rate.
"""

import dataclasses
import logging
import math
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from time import monotonic
from types import TracebackType
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from vlafit import arguments
from vlafit.errors import AnswerError, ConfigError, EmbodimentError
from vlafit.execution import Execution, InvalidAnswers, Limits, Plan, executable
from vlafit.observations import instruction_problems, observation, short
from vlafit.requests import LARGEST, expected_of
from vlafit.types import (
    ActionChunk,
    Actor,
    Committed,
    Embodiment,
    EpisodeKey,
    GuidedActor,
    Observation,
    chunk_of,
    history_of,
    require_same,
)

log = logging.getLogger(__name__)

OnInvalid = Literal["execute", "stop"]
SHORTEST_S = 1e-9  # that an answer takes
REMEMBERED = 10  # delays from which the next one is estimated: real-time chunking paper, algorithm 1


@runtime_checkable
class Embodied(Protocol):
    """An actor that names the robot it acts for."""

    embodiment: Embodiment


class Controller:
    """Executes the chunks of `actor` step by step, within `limits`.

    In the background, the robot goes on with the chunk that it has while the next one is computed, and a
    chunk begins at the step at which it arrives; otherwise `step` waits for the policy. Close it, or use it
    as a context manager.
    """

    def __init__(
        self,
        actor: Actor,
        execution: Execution = Execution(),  # noqa: B008 -- frozen
        *,
        limits: Limits | None = None,
        background: bool = False,
        on_invalid: OnInvalid = "execute",
        embodiment: Embodiment | None = None,
    ) -> None:
        """Raises ConfigError where the actor cannot act so. `embodiment` is the actor's own unless given.

        `on_invalid` is for policies that write tokens, where these make no chunk of actions: execute what the
        policy's format puts in its place, with a warning, or stop by an EmbodimentError.

        The `change` of `limits` counts from the last action sent, also of the episode before. An episode's
        first action counts from the state where its labels and unit are the action's and control is
        joint_position; otherwise the very first action has no reference, and only low and high limit it.
        """
        arguments.one_of("on_invalid", on_invalid, get_args(OnInvalid))
        arguments.flag("background", background)
        if not isinstance(actor, Actor):
            raise ConfigError(
                "actor must be a policy (vlafit.load_actor, vlafit.connect) or have its method act, not "
                f"{short(actor)}"
            )
        if not isinstance(execution, Execution):
            raise ConfigError(f"execution must be a vlafit.Execution, not {short(execution)}")
        if limits is not None and not isinstance(limits, Limits):
            raise ConfigError(f"limits must be vlafit.Limits, or None, not {short(limits)}")
        robot = _robot_of(actor, embodiment)
        if limits is not None and limits.low.shape != robot.action.shape:
            raise ConfigError(
                f"limits are of {len(limits.low)} dimensions, and the actions of the robot {robot.name!r} "
                f"have {robot.action.shape[0]}"
            )
        if execution.mode == "real_time" and not isinstance(actor, GuidedActor):
            raise ConfigError(
                f"execution real_time: actor {type(actor).__name__} cannot continue a chunk; choose "
                "chunk or ensemble"
            )
        if steps := chunk_of(actor):
            execution.require_chunk(steps)
        if sentence := execution.shortened(steps):
            log.warning("execution: %s", sentence)
        self.actor = actor
        self.execution = execution
        self.embodiment = robot
        self.limits = limits
        self._comparable = (
            robot.control == "joint_position"
            and robot.action.labels != ()
            and (robot.action.labels, robot.action.unit) == (robot.state.labels, robot.state.unit)
        )
        self._on_invalid = on_invalid
        self._tally = InvalidAnswers()
        self.waits = 0
        """Steps at which the robot stood still because no action was left."""
        self._thread = ThreadPoolExecutor(1, "vlafit-control") if background else None
        self._delays: deque[int] = deque([execution.delay] if execution.delay else [], REMEMBERED)
        self._newest: deque[Observation] = deque(maxlen=history_of(actor))
        expected = expected_of(actor, robot)
        self._read = expected.seen  # cameras that the policy looks at
        self._instructed = expected.instructed
        self._missing: set[str] = set()  # cameras whose absence was logged
        self._closed = False
        self._prepared = execution.mode != "real_time"
        self._episode = -1
        self._instruction = ""
        self._pending: Future[tuple[ActionChunk, float]] | None = None
        self._sent: NDArray[np.float32] | None = None  # the last action, of any episode

    def start(self, instruction: str | None, *, task: str = "", seed: int | None = None) -> None:
        """Begin an episode. Its noise is drawn from `task` (the instruction) and `seed` (a count of
        episodes).

        Raises ConfigError for what is no sentence, no text, or no whole number from 0 on; the episode before
        then goes on. A policy that reads no instruction may be given "" or None.
        """
        self._require_open()
        if instruction is None and not self._instructed:
            instruction = ""
        if problems := instruction_problems(instruction, self._instructed):
            raise ConfigError(problems[0])
        task = arguments.text("task", task) or instruction or ""
        seed = self._episode + 1 if seed is None else arguments.whole("seed", seed, 0, LARGEST)
        self._drop_pending()
        self._instruction = str(instruction)
        self._episode += 1
        self._key = EpisodeKey(seed, task, 0)
        self._begin_plan()
        self._newest.clear()
        self._begins = True  # whether no action of the episode was sent
        self._failed = False  # whether the last step raised: what it asked for must be asked again

    def _begin_plan(self) -> None:
        """Begin with no chunk: at an episode's start, and where the limits refused an action."""
        self._plan = Plan(self.execution)
        self._asked = -1  # the plan's step of the last observation that was sent
        self._answered_in = 0.0  # seconds of an answer while the robot stood still; 0: none yet
        self._moved_at = 0.0  # when the plan's first action was returned

    def step(self, images: Mapping[str, Any], state: Any) -> NDArray[np.float32]:
        """Return the action [a] to execute now, in the robot's units.

        `images` maps each camera to uint8 [h, w, 3]; None, or leaving it out, says that it is missing now.
        Raises EmbodimentError for what is not an observation of this robot and, if limits say so, for an
        action outside them; RemoteError where a remote policy does not answer.
        """
        self._require_open()
        if self._episode < 0:
            raise ConfigError("the controller has no instruction: call start first")
        now = _owned(
            observation(images, state, self._instruction, self.embodiment, instructed=self._instructed)
        )
        before = tuple(self._newest)
        self._newest.append(now)
        try:
            action = self._next_action()
        except BaseException:
            self._failed = True
            self._newest.clear()
            self._newest.extend(before)  # the step was not executed; it is there once when it is tried again
            raise
        self._sent, self._begins = action, False
        if self._plan.step == 1:
            self._moved_at = monotonic()
        self._log_missing(now)  # not before: a policy may refuse to act without any camera
        return action.copy()

    def _next_action(self) -> NDArray[np.float32]:
        """Return the action for the newest observation, asking the policy where that is due."""
        *past, newest = self._newest
        seen = dataclasses.replace(newest, past=tuple(past))
        self._collect(wait=False)
        since = self._plan.step - self._asked
        due = self._failed or self._asked < 0 or since >= self.execution.replan
        if self._pending is None and (due or not self._plan.left()):
            self._ask(seen)
        while not self._plan.left():
            self.waits += self._plan.step > 0
            if self._pending is None:  # what came late was too short
                self._ask(seen)
            self._collect(wait=True)
        action = self._plan.next()
        if self.limits is None:
            return action.copy()
        before = newest.state if self._begins and self._comparable else self._sent
        try:
            return self.limits.apply(action, before)
        except EmbodimentError:  # neither what is left of this plan is executed, nor what was asked from it
            if self._pending is not None:
                self._pending.cancel()
                self._pending = None
            self._begin_plan()
            raise

    def close(self) -> None:
        """Stop the thread. Later calls raise ConfigError; the actor stays open."""
        self._closed = True
        self._drop_pending()
        if self._thread is not None:
            self._thread.shutdown()

    def __enter__(self) -> "Controller":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require_open(self) -> None:
        if self._closed:
            raise ConfigError("the controller is closed; make another one")

    def _ask(self, seen: Observation) -> None:
        self._asked = self._plan.step
        committed = self._plan.committed(self._expected_delay() if self._thread else None)
        key, self._key = self._key, dataclasses.replace(self._key, replan=self._key.replan + 1)
        if self._thread is None:
            delay = self.execution.delay if self._answered_in else 0
            self._add(*self._act(seen, key, committed), delay)
        else:
            self._pending = self._thread.submit(self._act, seen, key, committed)

    def _expected_delay(self) -> int:
        """Return how many steps from now an answer is expected.

        Before any was measured, that is what an answer took while the robot stood still, in its steps. A
        policy that must be given the committed steps clean refuses more than it was trained for.
        """
        steps = self._plan.step
        if self._delays:
            return max(self._delays)
        if not self._answered_in or not steps or self.execution.guidance.prefix == "clean":
            return self.execution.delay
        period = (monotonic() - self._moved_at) / steps
        return max(1, math.ceil(self._answered_in / period)) if period > 0 else self._plan.left()

    def _act(
        self, seen: Observation, key: EpisodeKey, committed: Committed | None
    ) -> tuple[ActionChunk, float]:
        """Return the policy's chunk, and the seconds that it took."""
        began = monotonic()
        if committed is not None and isinstance(self.actor, GuidedActor):
            chunks = self.actor.act_guided([seen], [key], [committed])
        else:
            chunks = self.actor.act([seen], [key])
        match chunks:
            case [ActionChunk() as chunk]:
                return chunk, monotonic() - began
        listed = isinstance(chunks, list) and chunks
        given = f"{len(chunks)} of {short(chunks[0])}" if listed else short(chunks)
        raise EmbodimentError(
            f"stopped: {type(self.actor).__name__}.act must return one ActionChunk for each observation, and "
            f"for one it returned {given}"
        )

    def _collect(self, wait: bool) -> None:
        """Take the pending chunk, if it is there or must be waited for."""
        pending = self._pending
        if pending is None or not (wait or pending.done()):
            return
        self._pending = None  # an error is raised once, and the next step asks again
        chunk, took_s = pending.result()
        delay = self._plan.step - self._asked
        if delay:  # otherwise the robot stood still
            self._delays.append(delay)
        self._add(chunk, took_s, delay)

    def _add(self, chunk: ActionChunk, took_s: float, delay: int) -> None:
        """Take the chunk for the observation that was sent last."""
        fate = expected_of(self.actor, self.embodiment).fate_of_invalid
        if sentence := self._tally.sentence(chunk, fate):
            if self._on_invalid == "stop":
                raise AnswerError(
                    f"stopped: {sentence.partition(';')[0]}; `start` or the next `step` asks again"
                )
            if self._tally.has_doubled:
                log.warning("%s", sentence)
        try:
            actions = executable(chunk.actions, self.embodiment.action.shape[0])
        except EmbodimentError as error:
            raise EmbodimentError(f"stopped: {error}") from None
        if self._thread is not None and not self._prepared:
            took_s = self._prepare(ActionChunk(actions)) or took_s
        self._plan.add(ActionChunk(actions), self._asked, delay)
        self._answered_in, self._failed = self._answered_in or max(took_s, SHORTEST_S), False

    def _prepare(self, chunk: ActionChunk) -> float:
        """Let the policy continue its first chunk twice while the robot still stands.

        Returns the seconds of the second answer; 0 where it will not be asked to. The first imports or
        compiles what later ones need: in motion it would come long after the committed steps.
        """
        execution = self.execution
        plan = Plan(execution)
        plan.add(chunk, 0, 0)
        plan.step = execution.replan
        is_clean = execution.guidance.prefix == "clean"
        committed = plan.committed(execution.delay or (0 if is_clean else 1))
        if committed is None or not committed.delay:
            return 0.0
        *past, newest = self._newest
        seen = dataclasses.replace(newest, past=tuple(past))
        self._act(seen, self._key, committed)
        _, took_s = self._act(seen, self._key, committed)
        self._prepared = True
        return took_s

    @property
    def invalid_answers(self) -> int:
        """Answers of a policy that writes tokens that were no chunk of actions."""
        return self._tally.invalid

    def _drop_pending(self) -> None:
        """Let a request of the episode before end, so that its chunk is not taken for one of the next."""
        pending, self._pending = self._pending, None
        if pending is not None and not pending.cancel():
            pending.exception()

    def _log_missing(self, seen: Observation) -> None:
        if not set(self._read) & set(seen.images):
            return  # the actor refuses
        for camera in self._read:
            if camera not in seen.images and camera not in self._missing:
                self._missing.add(camera)
                log.warning("camera %r is missing; the policy acts without it (this is logged once)", camera)


def _robot_of(actor: Actor, given: Embodiment | None) -> Embodiment:
    """Return the robot that an actor acts for; one that is `given` as well must be the same."""
    if given is not None and not isinstance(given, Embodiment):
        raise ConfigError(f"embodiment must be a vlafit.types.Embodiment, or None, not {short(given)}")
    own = actor.embodiment if isinstance(actor, Embodied) else None
    if given is not None and own is not None:
        require_same(given, "the embodiment that is given", own, "that of the actor")
    robot = given or own
    if robot is None:
        raise ConfigError(
            f"actor {type(actor).__name__} does not say for which robot it acts: give embodiment"
        )
    return robot


def _owned(seen: Observation) -> Observation:
    """Return the observation with arrays of its own: a robot may fill its buffers anew at every step."""
    images = {camera: pixels.copy() for camera, pixels in seen.images.items()}
    return dataclasses.replace(seen, images=images, state=seen.state.copy())
