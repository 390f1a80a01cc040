"""Compare a policy and the robot that it is evaluated on, point by point; and list what was chosen."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from vlafit.agreement.values import Item, Role
from vlafit.errors import short_list
from vlafit.execution import Execution
from vlafit.types import Embodiment, Feature, plain_unit

INVALID = "answer that is no chunk"  # of tokens: what is executed
RENDERER = "the policy sees other pictures than it learned from; the difference may cost successes"


def evaluation_items(policy: Embodiment, other: Embodiment, role: Role) -> list[Item]:
    """Compare a policy's robot with that of a protocol or a dataset; `types.require_same` has let them pass.

    What one side does not state is assumed to be as the other states it; only the renderer may differ.
    """
    here, there = {"cameras": _cameras(policy)}, {"cameras": _cameras(other)}
    short: dict[str, str] = {}
    for name, mine, its in (("state", policy.state, other.state), ("action", policy.action, other.action)):
        here |= _column(name, mine)
        there |= _column(name, its)
        short |= {", ".join(column.labels): short_list(column.labels) for column in (mine, its)}
    for facts, robot in ((here, policy), (there, other)):
        facts |= {"control mode": robot.control, "control rate": f"{robot.hz:g} Hz" if robot.hz else ""}
        facts |= {"renderer": robot.renderer}
    items = [_item(name, text, there[name], role) for name, text in here.items() if text or there[name]]
    for name in ("state names", "action names"):
        if not here[name] and not there[name]:
            items.append(Item(name, {}, "", "assumed", "neither side names them: same order"))
    return [replace(item, short=short) for item in items]


def invalid_items(fate: str) -> list[Item]:
    """Return an item on what is executed where a policy's tokens are no chunk; none of one without tokens."""
    why = "what the robot executes then"
    return [Item(INVALID, {"checkpoint": fate}, fate, "assumed", why)] if fate else []


def chosen(name: str, stated: str, value: str, role: Role) -> Iterator[Item]:
    """Yield an item where another value was chosen than is stated."""
    if stated != value:
        yield Item(name, {role: stated}, value, "chosen")


def replan_items(execution: Execution, chunk: int, prefix: str = "") -> Iterator[Item]:
    """Yield an item where chunks of `chunk` steps (0: not known) end before the policy is asked again."""
    if shorter := execution.shortened(chunk):
        sides = {"protocol": str(execution.replan), "checkpoint": f"a chunk of {chunk}"}
        yield Item(f"{prefix}replan", sides, str(chunk), "differs", shorter)


def executed_items(execution: Execution, executed: int) -> Iterator[Item]:
    """Yield an item where the checkpoint's own program executes another number of steps of a chunk
    (`executed`, 0: not known), which costs or gains successes."""
    if executed not in (0, execution.replan):
        sides = {"protocol": str(execution.replan), "checkpoint": str(executed)}
        reason = (
            f"its own program executes {executed} steps before it asks again; --replan {executed} does so"
        )
        yield Item("steps executed", sides, str(execution.replan), "differs", reason)


def statement(items: Sequence[Item]) -> str:
    """Return how many points are the same, in a sentence below the table of the others."""
    same = sum(item.status == "same" for item in items)
    every = "all" if same == len(items) else "the other"
    return f"both sides agree on {every} {same} points" if same else ""


def _item(name: str, policy: str, other: str, role: Role) -> Item:
    sides: dict[str, str] = {r: t for r, t in (("checkpoint", policy), (role, other)) if t}
    value = other or policy
    if not policy or not other:
        return Item(name, sides, value, "assumed", f"the {'checkpoint' if not policy else role} does not say")
    if name == "renderer" and policy != other:
        return Item(name, sides, value, "differs", RENDERER)
    return Item(name, sides, value, "same")


def _cameras(robot: Embodiment) -> str:
    sizes = {camera.name: f"{camera.name} {camera.shape[0]}x{camera.shape[1]}" for camera in robot.cameras}
    return ", ".join(sizes[name] for name in sorted(sizes))


def _column(name: str, column: Feature) -> dict[str, str]:
    return {
        f"{name} dimensions": str(column.shape[0]),
        f"{name} names": ", ".join(column.labels),
        f"{name} unit": plain_unit(column.unit),
    }
