"""Compare the sides item by item."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from vlafit.agreement import cameras as camera_slots
from vlafit.agreement.columns import by_name, mispaired
from vlafit.agreement.forms import compare_forms
from vlafit.agreement.values import Agreement, Item, Party, Status
from vlafit.errors import ConfigError, short_list
from vlafit.recipe import AdaptRecipe
from vlafit.types import Embodiment, Feature, differences, plain_unit

ROBOT = (
    'if this is another robot: [adapt] robot = true and data.statistics = "data" (where it has more '
    "dimensions than the policy takes, also policy.config = { state_dim = N, action_dim = N } and "
    'policy.resize = "keep" or "fresh"); else correct the card'
)

ROBOT_ONLY = (
    "[adapt] robot = true is set, and the checkpoint's statistics are of its own robot: set "
    'data.statistics = "data", too; '
)

ACCEPT_ROBOT = ("--adapt.robot true", "--data.statistics data")

UNREPEATED = (
    "vlafit does not repeat this conversion: convert the dataset's states and actions, then "
    '[adapt] robot = true and data.statistics = "data"'
)

EVALUATION = "evaluation "
"""How names of a protocol's items begin."""


def agree(
    dataset: Party,
    checkpoint: Party | None,
    adapt: AdaptRecipe,
    *,
    fresh_statistics: bool,
    slots: Sequence[str] = (),
) -> Agreement:
    """Compare the sides; conflicts are items of the result, see `Agreement.require`.

    `checkpoint` is None where training starts from fresh weights, or the checkpoint says nothing about the
    robot. `slots` are the camera slots of a run on several embodiments, which count where the checkpoint
    names none. `fresh_statistics` says whether normalisation statistics are fitted to the dataset.
    Raises ConfigError for an `adapt` section that names cameras that do not exist, or chooses between sides
    of which one does not say.
    """
    assert dataset.embodiment is not None
    cameras, items = camera_slots.decide(dataset, checkpoint, adapt, slots)
    if checkpoint is not None and checkpoint.embodiment is not None:
        items += _columns(dataset.embodiment, checkpoint, adapt, fresh_statistics)
    relative, relative_item = _relative(dataset, checkpoint, adapt, fresh_statistics)
    if relative_item.status != "conflict" and (pair := mispaired(relative, dataset.embodiment)):
        sides = {"dataset": pair.text, **{r: t for r, t in relative_item.sides.items() if r != "dataset"}}
        relative_item = Item(relative_item.name, sides, "", "conflict", fix=pair.fix)
    items.append(_paired_by_number(relative_item, relative, dataset.embodiment))
    forms, form_items = compare_forms(dataset, checkpoint, adapt, fresh_statistics)
    items += form_items
    if checkpoint is not None:
        items += _conversions(checkpoint, adapt.robot and fresh_statistics)
        if checkpoint.embodiment is not None:
            moved = any(pose.relative for pose in forms.action.poses)
            differences = (any(relative) or moved) and not fresh_statistics
            items += _control(dataset.embodiment, checkpoint.embodiment, adapt, fresh_statistics, differences)
            items.append(_renderer(dataset.embodiment, checkpoint.embodiment, adapt.robot))
    if adapt.robot and not fresh_statistics:
        items = [replace(item, fix=item.fix.replace(ROBOT, ROBOT_ONLY + ROBOT)) for item in items]
    return Agreement(tuple(items), cameras, relative, forms=forms)


# ------------------------------------------------------------------------------------------------- columns


def _columns(here: Embodiment, checkpoint: Party, adapt: AdaptRecipe, fresh: bool) -> Iterator[Item]:
    there = checkpoint.embodiment
    assert there is not None
    permitted = adapt.robot and fresh
    rooms = checkpoint.room or (None, None)
    for name, mine, other, room in (
        ("state", here.state, there.state, rooms[0]),
        ("action", here.action, there.action, rooms[1]),
    ):
        sides = {"dataset": str(mine.shape[0]), "checkpoint": str(other.shape[0])}
        item = f"{name} dimensions"
        if mine.shape == other.shape:
            yield Item(item, sides, sides["dataset"], "same")
        elif permitted:
            yield Item(item, sides, sides["dataset"], "chosen", "adapt.robot")
        else:
            accept = ACCEPT_ROBOT
            if room is not None and mine.shape[0] > room:
                accept += (f"--policy.config.{name}_dim {mine.shape[0]}", "--policy.resize fresh")
            yield Item(item, sides, "", "conflict", fix=ROBOT, accept=accept)
        yield _labels(name, mine, other, permitted)
        if mine.unit or other.unit:
            fix = f"convert the column: `scale` and `offset` of robot.{name} in the card; {ROBOT}"
            yield _unit(f"{name} unit", mine.unit, other.unit, permitted, fix)


def _labels(name: str, here: Feature, there: Feature, permitted: bool) -> Item:
    """Compare names of dimensions. Long lists are short on a console, unless both sides have names in common
    and differ: then each name may matter."""
    made = _names(name, here, there, permitted)
    if made.status in ("chosen", "conflict") and set(here.labels) & set(there.labels):
        return made
    return replace(made, short={", ".join(side): short_list(side) for side in (here.labels, there.labels)})


def _names(name: str, here: Feature, there: Feature, permitted: bool) -> Item:
    item = f"{name} names"
    sides = {
        role: ", ".join(feature.labels)
        for role, feature in (("dataset", here), ("checkpoint", there))
        if feature.labels
    }
    if not sides:
        return Item(item, sides, "", "assumed", "neither side names them: same order")
    if len(sides) == 1:
        silent = "dataset" if not here.labels else "checkpoint"
        value = ", ".join(here.labels or there.labels)
        return Item(item, sides, value, "assumed", f"the {silent} does not name them: same order")
    if here.labels == there.labels:
        return Item(item, sides, sides["dataset"], "same")
    if permitted:
        return Item(item, sides, sides["dataset"], "chosen", "adapt.robot")
    fix = ROBOT
    if sorted(here.labels) == sorted(there.labels):
        fix = (
            f"the same dimensions in another order: reorder the columns, in robot.{name}.keys of the card "
            f'(a key may be "KEY[:, 2]"), with labels in this order; {fix}'
        )
        return Item(item, sides, "", "conflict", fix=fix)
    fix = f"if only the names differ, write the checkpoint's in robot.{name}.labels of the card; {fix}"
    return Item(item, sides, "", "conflict", fix=fix, accept=ACCEPT_ROBOT)


def _stated(
    name: str, here: str, there: str, permitted: bool, fix: str, accept: tuple[str, ...] = ACCEPT_ROBOT
) -> Item:
    sides = {role: text for role, text in (("dataset", here), ("checkpoint", there)) if text}
    if there and not here and permitted:  # the checkpoint's word is about another robot
        return Item(name, sides, "not stated", "chosen", "adapt.robot")
    if not here or not there:
        silent = "dataset" if not here else "checkpoint"
        return Item(name, sides, here or there, "assumed", f"the {silent} does not say")
    if here == there:
        return Item(name, sides, here, "same")
    if permitted:
        return Item(name, sides, here, "chosen", "adapt.robot")
    return Item(name, sides, "", "conflict", fix=fix, accept=accept)


def _unit(name: str, here: str, there: str, permitted: bool, fix: str) -> Item:
    """Compare units by their symbols; the item shows what each side wrote."""
    item = _stated(name, plain_unit(here), plain_unit(there), permitted, fix)
    written = {"dataset": here, "checkpoint": there}
    return replace(item, sides={role: written[role] for role in item.sides})


# --------------------------------------------------------------------------------------- actions and control


def _relative(
    dataset: Party, checkpoint: Party | None, adapt: AdaptRecipe, fresh: bool
) -> tuple[tuple[bool, ...], Item]:
    assert dataset.embodiment is not None and dataset.relative is not None
    name, here = "relative actions", dataset.relative
    if checkpoint is not None and checkpoint.relative_inside:
        return here, _relative_inside(here, checkpoint.relative_inside, adapt, fresh)
    there = checkpoint.relative if checkpoint is not None else None
    names = dataset.embodiment.action.labels
    others = checkpoint.embodiment.action.labels if checkpoint and checkpoint.embodiment else ()
    if there and set(there) != {there[0]} and names and others:
        there = by_name(there, others, names)
        if there is None and adapt.actions == "checkpoint":
            sides = {"dataset": f"actions {', '.join(names)}", "checkpoint": f"actions {', '.join(others)}"}
            fix = (
                "the checkpoint's relative actions have no namesakes in the card: correct the labels, or "
                '[adapt] actions = "data" with data.statistics = "data"'
            )
            return here, Item(name, sides, "", "conflict", fix=fix)
        there = checkpoint.relative if there is None and checkpoint else there
    sides = {
        role: describe_mask(mask)
        for role, mask in (("dataset", here), ("checkpoint", there))
        if mask is not None
    }
    if there is None:
        if adapt.actions:
            owner = checkpoint.title if checkpoint else "there is no checkpoint, which"
            raise ConfigError(
                f"adapt.actions = {adapt.actions!r} chooses between two sides, and {owner} does not say "
                "whether actions are relative; remove it"
            )
        if checkpoint is None:
            return here, Item(name, sides, describe_mask(here), "same", "no checkpoint")
        return here, Item(name, sides, describe_mask(here), "assumed", "the checkpoint does not say")
    if same_actions(here, there):
        return here, Item(name, sides, describe_mask(here), "same")
    if adapt.actions == "checkpoint" and len(there or here) == len(here or there):
        return there, Item(name, sides, describe_mask(there), "chosen", 'adapt.actions = "checkpoint"')
    if adapt.actions == "data" and fresh:
        return here, Item(name, sides, describe_mask(here), "chosen", 'adapt.actions = "data"')
    fix = (
        '[adapt] actions = "checkpoint" keeps the meaning that the weights have learned; actions = "data" '
        'with data.statistics = "data" teaches them the card\'s'
    )
    if adapt.actions == "checkpoint" or (here and there and len(here) != len(there)):
        fix = 'the checkpoint has other dimensions: [adapt] actions = "data" with data.statistics = "data"'
    elif adapt.actions == "data":
        fix = 'the checkpoint\'s statistics are of its own actions: set data.statistics = "data", too'
    return here, Item(name, sides, "", "conflict", fix=fix)


def _relative_inside(here: tuple[bool, ...], there: str, adapt: AdaptRecipe, fresh: bool) -> Item:
    """Return the item of a policy that makes actions relative itself, which vlafit's does not."""
    sides = {"dataset": describe_mask(here), "checkpoint": there}
    if adapt.robot and fresh and adapt.actions != "checkpoint":
        return Item("relative actions", sides, describe_mask(here), "chosen", "adapt.robot")
    fix = UNREPEATED
    if adapt.actions == "checkpoint":
        fix = f'not with [adapt] actions = "checkpoint": {fix}'
    return Item("relative actions", sides, "", "conflict", fix=fix)


def _paired_by_number(item: Item, relative: tuple[bool, ...], robot: Embodiment) -> Item:
    """Return the item of relative actions with what it assumes where names do not pair them with states."""
    states, actions = robot.state.labels, robot.action.labels
    if item.status == "conflict" or not any(relative) or (states and actions):
        return item
    named = "only the states" if states else "only the actions" if actions else "neither states nor actions"
    assumption = f"{named} have names: action i is taken to be relative to state i"
    return replace(
        item,
        status="assumed" if item.status == "same" else item.status,
        reason=f"{item.reason}; {assumption}" if item.reason else assumption,
    )


def same_actions(one: tuple[bool, ...], other: tuple[bool, ...]) -> bool:
    """Whether two masks of relative actions mean the same; an empty one is absolute, as one of False is."""
    return one == other or not (any(one) or any(other))


def describe_mask(mask: tuple[bool, ...]) -> str:
    """Return which actions are relative: "absolute", "all relative", or their dimensions."""
    if not any(mask):
        return "absolute"
    if all(mask):
        return "all relative"
    chosen = [str(number) for number, on in enumerate(mask) if on]
    return f"relative in dimensions {', '.join(chosen)}"


def _conversions(checkpoint: Party, permitted: bool) -> Iterator[Item]:
    for text in checkpoint.conversions:
        sides = {"dataset": "states and actions as recorded", "checkpoint": text}
        if permitted:
            yield Item("conversion", sides, "as recorded", "chosen", "adapt.robot")
        else:
            yield Item("conversion", sides, "", "conflict", fix=UNREPEATED)


def _control(
    here: Embodiment, there: Embodiment, adapt: AdaptRecipe, fresh: bool, differences: bool
) -> Iterator[Item]:
    """Yield the items of control. `differences`: the checkpoint's statistics of relative actions are in use.

    Those depend on how far the robot moves in a step, so that another rate needs statistics of its own.
    """
    yield _stated("control mode", here.control, there.control, adapt.robot and fresh, ROBOT)
    fix = "[adapt] robot = true, if the policy is to learn this rate; else correct the card"

    def rate(hz: float) -> str:
        return f"{hz:g} Hz" if hz else ""

    accept = ACCEPT_ROBOT[:1]
    if differences:
        accept = ACCEPT_ROBOT
        fix = (
            "actions are relative, and the checkpoint's statistics are of differences over steps of "
            f'{rate(there.hz)}: [adapt] robot = true with data.statistics = "data", if the policy is to '
            "learn this rate; else correct the card"
        )
    yield _stated("control rate", rate(here.hz), rate(there.hz), adapt.robot and not differences, fix, accept)


def _renderer(here: Embodiment, there: Embodiment, other_robot: bool) -> Item:
    if other_robot and not here.renderer:
        sides: dict[str, str] = {"checkpoint": there.renderer} if there.renderer else {}
        return Item("renderer", sides, "not stated", "chosen", "adapt.robot")
    sides = {r: text for r, text in (("dataset", here.renderer), ("checkpoint", there.renderer)) if text}
    if len(sides) < 2:
        reason = "neither side says"
        if sides:
            reason = f"the {'checkpoint' if here.renderer else 'dataset'} does not say"
        return Item("renderer", sides, here.renderer or there.renderer, "assumed", reason)
    if here.renderer == there.renderer:
        return Item("renderer", sides, here.renderer, "same")
    reason = "the policy learns the dataset's pictures; the difference may cost successes"
    return Item("renderer", sides, here.renderer, "differs", reason)


def protocol_items(policy: Embodiment, protocol: Embodiment, name: str) -> list[Item]:
    """Return what differs between the policy's robot (the dataset's) and that of a protocol's environment."""
    fix = "choose a protocol of the same robot, or correct its [env]"
    items = []
    for text in differences(policy, protocol):
        point, _, sides = text.partition(": ")
        here, _, there = sides.removesuffix(" there").partition(" here, ")
        status: Status = "conflict"
        items.append(Item(f"{EVALUATION}{point}", {"dataset": here, "protocol": there}, "", status, fix=fix))
    if not items:
        items.append(Item(f"{EVALUATION}robot", {"protocol": f"{name}: {protocol.name}"}, "the same", "same"))
    if policy.renderer and protocol.renderer and policy.renderer != protocol.renderer:
        sides = {"dataset": policy.renderer, "protocol": protocol.renderer}
        reason = "the policy sees other pictures than it learned from; the difference may cost successes"
        items.append(Item(f"{EVALUATION}renderer", sides, protocol.renderer, "differs", reason))
    return items
