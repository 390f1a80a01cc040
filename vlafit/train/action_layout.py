"""Compare the dimensions of an action with what a policy's loss and weights take them for."""

from collections.abc import Iterator

from vlafit.agreement import Item
from vlafit.codec import Codec
from vlafit.nn.policy import ActionLayout


def items(layout: ActionLayout | None, codec: Codec, start: str) -> Iterator[Item]:
    """Yield what the policy takes the dimensions of an action for; a conflict where they cannot be that.

    `start` is the checkpoint that training starts from; "" for fresh weights.
    """
    if layout is None:
        return
    count, labels = codec.columns.action_dimensions, codec.columns.action_labels
    here = f"{count} dimensions" + (f": {', '.join(labels)}" if labels else "")
    there = f"{layout.name!r}: {layout.text}"
    sides = {"dataset": here, **({"checkpoint": there} if start else {})}
    short = {here: f"{count} dimensions"}
    if count not in layout.counts:
        counts = " or ".join(map(str, layout.counts))
        declare = "declare the poses and grippers in the card, so that it learns these; or, " * layout.poses
        fix = f"the policy takes actions of {counts} dimensions: {declare}to learn others: {layout.remedy}"
        yield Item(
            "action space", {"dataset": here, "checkpoint": there}, "", "conflict", fix=fix, short=short
        )
    elif layout.poses and not codec.config.action_form.poses:
        reason = "the card declares no poses: its dimensions are taken for these"
        yield Item("action space", sides, there, "assumed", reason, short=short)
    else:
        yield Item("action space", sides, there, "same", short=short)
