"""Turn a robot's states and actions into what a policy learns of them, before normalisation, and back.

Some dimensions of an action may be minus a dimension of the state; an end effector's pose may be learned in
the frame of the state's, and its rotation in another form; a gripper as 0 or 1; angles as sines and cosines.
Statistics are those of what is learned.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vlafit.codec.rotations import from_matrices, to_matrices
from vlafit.errors import CodecError
from vlafit.types import ROTATION_WIDTH, Angles, ColumnForm, Embodiment, Feature, Gripper, Pose

THRESHOLD = 0.5  # X-VLA and LeRobot 0.6.1: a gripper closes above it


@dataclass(frozen=True)
class _Piece:
    """Dimensions of a column, and of what is learned of it."""

    source: slice
    target: slice
    what: Pose | Gripper | Angles | None
    """None: as they are."""


class Columns:
    """Turns states and actions into what is learned of them, and answers back into actions.

    `state_dimensions` and `action_dimensions` count what is learned, `state_labels` and `action_labels` name
    it where the robot's dimensions have names.
    """

    def __init__(
        self,
        robot: Embodiment,
        relative: Sequence[bool] = (),
        state_form: ColumnForm | None = None,
        action_form: ColumnForm | None = None,
        relative_to: Sequence[int] = (),
    ) -> None:
        """`relative` says for each action dimension whether a state is subtracted: that of the same number,
        or that of `relative_to`. Raises CodecError where these do not go together.
        """
        self._state_form, self._action_form = state_form or ColumnForm(), action_form or ColumnForm()
        state, action = robot.state, robot.action
        _require_relative(relative, relative_to, state, action)
        self._dimensions = np.flatnonzero(np.asarray(relative, dtype=np.bool_))
        self._references = np.asarray(relative_to, np.int64)[self._dimensions] if len(relative_to) else (
            self._dimensions
        )  # fmt: skip
        self._state_pieces = _pieces(self._state_form, state, "state")
        self._action_pieces = _pieces(self._action_form, action, "action")
        _require_forms(self._state_form, self._action_form, self._dimensions)
        self.state_dimensions = self._state_pieces[-1].target.stop
        self.action_dimensions = self._action_pieces[-1].target.stop
        self.state_labels = _labels(self._state_pieces, state)
        self.action_labels = _labels(self._action_pieces, action)
        self._plain_state, self._plain_action = self._state_form.is_plain, self._action_form.is_plain

    @property
    def is_relative(self) -> bool:
        """Whether an action is learned relative to the state, so that it depends on the chunk's start."""
        return bool(len(self._dimensions)) or any(pose.relative for pose in self._action_form.poses)

    @property
    def settings(self) -> list[object]:
        """Everything that decides what is learned, as JSON; empty where columns are learned as they are."""
        mask = np.isin(np.arange(self._action_pieces[-1].source.stop), self._dimensions).tolist()
        settings: list[object] = [mask] if any(mask) else []
        if not np.array_equal(self._dimensions, self._references):
            settings.append(self._references.tolist())
        forms = (self._state_form, self._action_form)
        return settings + [asdict(form) for form in forms if not all(one.is_plain for one in forms)]

    def states(self, states: NDArray) -> NDArray:
        """Return what is learned of states [..., s]: they themselves, or float64 [..., S']."""
        return states if self._plain_state else _learned(self._state_pieces, states)

    def actions(self, actions: NDArray, states: NDArray | None = None) -> NDArray:
        """Return what is learned of actions [..., a] where the chunk starts at `states` [..., s].

        Only actions that are learned relative to the state (`is_relative`) need them. A new array of their
        dtype, float64 where the form is another; they themselves where nothing changes.
        """
        if len(self._dimensions):
            assert states is not None
            actions = actions.copy()
            actions[..., self._dimensions] -= states[..., self._references]
        if self._plain_action:
            return actions
        learned = _learned(self._action_pieces, actions)
        for pose, place, turn, matrices, positions in self._relative_poses(states):
            learned[..., place] = _turned(
                matrices, actions[..., pose.position : pose.position + 3] - positions
            )
            own = to_matrices(actions[..., _rotation(pose)], pose.form)
            learned[..., turn] = from_matrices(matrices @ own, pose.policy_form)
        return learned

    def back(self, learned: NDArray, state: NDArray) -> NDArray[np.float64]:
        """Return the robot's actions [..., a] that `learned` [..., A'] stands for at `state` [s].

        Raises CodecError where a rotation is none.
        """
        if self._plain_action:
            actions = np.array(learned, np.float64)
        else:
            shape = (*learned.shape[:-1], self._action_pieces[-1].source.stop)
            actions = np.empty(shape, np.float64)
            for piece in self._action_pieces:
                actions[..., piece.source] = _undone(piece, learned[..., piece.target])
            for pose, place, turn, matrices, positions in self._relative_poses(state):
                forth = matrices.swapaxes(-1, -2)
                moved = _turned(forth, np.asarray(learned[..., place], np.float64)) + positions
                actions[..., pose.position : pose.position + 3] = moved
                own = to_matrices(learned[..., turn], pose.policy_form)
                actions[..., _rotation(pose)] = from_matrices(forth @ own, pose.form)
        if len(self._dimensions):
            actions[..., self._dimensions] += state[..., self._references]
        return actions

    def as_recorded(self, learned: NDArray) -> NDArray[np.float64]:
        """Return numbers [A'] of what is learned of an action for the robot's dimensions [a].

        NaN for those that are not learned as they are.
        """
        numbers = np.full(self._action_pieces[-1].source.stop, np.nan)
        for piece in self._action_pieces:
            if piece.what is None:
                numbers[piece.source] = learned[piece.target]
        numbers[self._dimensions] = np.nan
        return numbers

    def _relative_poses(
        self, states: NDArray | None
    ) -> Iterator[tuple[Pose, slice, slice, NDArray[np.float64], NDArray[np.float64]]]:
        """Yield each relative pose with where its position and rotation are learned, the matrices [..., 3, 3]
        from the base's frame into that of the state's pose, and that one's position [..., 3].
        """
        for pose in self._action_form.poses:
            if not pose.relative:
                continue
            assert states is not None
            reference = self._state_form.poses[pose.reference]
            matrices = to_matrices(states[..., _rotation(reference)], reference.form).swapaxes(-1, -2)
            positions = np.asarray(states[..., reference.position : reference.position + 3], np.float64)
            turn = next(piece.target for piece in self._action_pieces if piece.what is pose)
            yield pose, self._learned_place(pose.position), turn, matrices, positions

    def _learned_place(self, first: int) -> slice:
        """Return where three dimensions of an action from `first` on, which are learned as they are, lie."""
        piece = next(p for p in self._action_pieces if p.source.start <= first < p.source.stop)
        start = piece.target.start + first - piece.source.start
        return slice(start, start + 3)


def _rotation(pose: Pose) -> slice:
    return slice(pose.rotation, pose.rotation + ROTATION_WIDTH[pose.form])


def _turned(matrices: NDArray[np.float64], vectors: NDArray) -> NDArray[np.float64]:
    """Return each vector [..., 3] turned by its matrix [..., 3, 3]."""
    return (matrices @ vectors[..., None])[..., 0]


def _learned(pieces: Sequence[_Piece], values: NDArray) -> NDArray[np.float64]:
    learned = np.empty((*values.shape[:-1], pieces[-1].target.stop), np.float64)
    for piece in pieces:
        learned[..., piece.target] = _done(piece, values[..., piece.source])
    return learned


def _done(piece: _Piece, values: NDArray) -> NDArray:
    match piece.what:
        case Pose() as pose if pose.form != pose.policy_form:
            return from_matrices(to_matrices(values, pose.form), pose.policy_form)
        case Gripper() as gripper:
            return (values.astype(np.float64) - gripper.zero) / (gripper.one - gripper.zero)
        case Angles():
            angles = values.astype(np.float64)
            return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
        case _:
            return values


def _undone(piece: _Piece, values: NDArray) -> NDArray:
    match piece.what:
        case Pose() as pose if not pose.relative and pose.form != pose.policy_form:
            return from_matrices(to_matrices(values, pose.policy_form), pose.form)
        case Pose() as pose if pose.relative:
            return np.zeros((*values.shape[:-1], ROTATION_WIDTH[pose.form]))  # filled in with the reference
        case Gripper() as gripper:
            return np.where(values > THRESHOLD, gripper.one, gripper.zero)
        case _:
            return values


def _pieces(form: ColumnForm, feature: Feature, name: str) -> tuple[_Piece, ...]:
    """Return a column's dimensions in order. Raises CodecError where parts of the form overlap."""
    starts: dict[int, tuple[int, int, Pose | Gripper | Angles]] = {}
    taken: dict[int, str] = {}

    def take(first: int, count: int, what: str) -> None:
        if first < 0 or count < 1 or first + count > feature.shape[0]:
            raise CodecError(
                f"{name}: {what} is dimensions {first} to {first + count - 1}, and there are "
                f"{feature.shape[0]}, counted from 0"
            )
        for dimension in range(first, first + count):
            if dimension in taken:
                raise CodecError(f"{name}: dimension {dimension} is both {taken[dimension]} and {what}")
            taken[dimension] = what

    for number, pose in enumerate(form.poses):
        width = ROTATION_WIDTH[pose.form]
        take(pose.position, 3, f"the position of pose {number}")
        take(pose.rotation, width, f"the rotation of pose {number} ({pose.form})")
        starts[pose.rotation] = (width, ROTATION_WIDTH[pose.policy_form], pose)
    for number, gripper in enumerate(form.grippers):
        take(gripper.dimension, 1, f"gripper {number}")
        if gripper.zero == gripper.one or not np.isfinite([gripper.zero, gripper.one]).all():
            raise CodecError(f"{name}: gripper {number}: zero and one must be two different numbers")
        starts[gripper.dimension] = (1, 1, gripper)
    for angles in form.angles:
        take(angles.first, angles.count, "angles")
        starts[angles.first] = (angles.count, 2 * angles.count, angles)
    pieces: list[_Piece] = []
    source = target = 0
    while source < feature.shape[0]:
        width, learned, what = starts.get(source, (1, 1, None))
        if what is None and pieces and pieces[-1].what is None:
            last = pieces.pop()
            source, target, width, learned = (
                last.source.start, last.target.start,
                source + 1 - last.source.start, target + 1 - last.target.start,
            )  # fmt: skip
        pieces.append(_Piece(slice(source, source + width), slice(target, target + learned), what))
        source, target = source + width, target + learned
    return tuple(pieces)


def _labels(pieces: Sequence[_Piece], feature: Feature) -> tuple[str, ...]:
    """Return a name for each learned dimension; none where the robot's have none."""
    if not feature.labels:
        return ()
    names: list[str] = []
    for piece in pieces:
        own = feature.labels[piece.source]
        match piece.what:
            case Pose() as pose if pose.form != pose.policy_form:
                width = ROTATION_WIDTH[pose.policy_form]
                names += [f"{own[0]}.{pose.policy_form}.{number}" for number in range(width)]
            case Angles():
                names += [f"sin {label}" for label in own] + [f"cos {label}" for label in own]
            case _:
                names += own
    return tuple(names)


def _require_relative(
    relative: Sequence[bool], relative_to: Sequence[int], state: Feature, action: Feature
) -> None:
    for name, values in (("relative", relative), ("relative_to", relative_to)):
        if values and len(values) != action.shape[0]:
            raise CodecError(f"{name} has {len(values)} entries for {action.shape[0]} action dimensions")
    places = relative_to or range(action.shape[0])
    beyond = [d for d, on in enumerate(relative) if on and not 0 <= places[d] < state.shape[0]]
    if beyond:
        raise CodecError(f"relative: action dimensions {beyond} have no state dimension to be relative to")


def _require_forms(state: ColumnForm, action: ColumnForm, relative: NDArray[np.int64]) -> None:
    """Raise CodecError for what has no meaning in a state or an action, or is relative to nothing."""
    faults: tuple[tuple[Literal["state", "action"], object, str], ...] = (
        ("state", state.grippers, "grippers are of actions; a state keeps its own values"),
        ("action", action.angles, "angles are of states; their sines would not come back as angles"),
        ("state", [p for p in state.poses if p.relative], "only an action is relative to the state"),
    )
    for name, found, why in faults:
        if found:
            raise CodecError(f"{name}: {why}")
    changed: dict[int, str] = {g.dimension: "gripper" for g in action.grippers}
    for pose in action.poses:
        turn = _rotation(pose)
        own = (*range(pose.position, pose.position + 3), *range(turn.start, turn.stop))
        changed |= dict.fromkeys(own, "pose")
        if pose.relative and not 0 <= pose.reference < len(state.poses):
            raise CodecError(
                f"action: a pose is relative to pose {pose.reference} of the state, which has "
                f"{len(state.poses)}"
            )
    for dimension in relative.tolist():
        if dimension in changed:
            raise CodecError(
                f"action: dimension {dimension} is part of a {changed[dimension]} and relative to the state "
                "by itself; a whole pose is relative by `relative = true` in its table"
            )
