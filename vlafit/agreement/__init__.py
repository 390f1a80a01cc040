"""Compare what dataset, checkpoint, recipe and protocol say about the robot, and decide which side holds.

Each item of an `Agreement` names what every side declares, the value that holds and the reason. A difference
that changes what the policy sees is a conflict, and a conflict is an error that names both sides, unless the
recipe's `[adapt]` section chooses a side. Nothing here reads files or changes a policy.
"""

from vlafit.agreement.camera_map import propose
from vlafit.agreement.cameras import shared_slots
from vlafit.agreement.compare import EVALUATION, agree, describe_mask, protocol_items, same_actions
from vlafit.agreement.consent import Consent
from vlafit.agreement.evaluation import (
    INVALID,
    chosen,
    evaluation_items,
    executed_items,
    invalid_items,
    replan_items,
)
from vlafit.agreement.forms import describe_form, describe_recorded, recorded_otherwise
from vlafit.agreement.learned import UNSAID, Learned
from vlafit.agreement.values import AS_STORED, CONVERSIONS, Agreement, Forms, Item, Party, Status, join

__all__ = [
    "AS_STORED",
    "CONVERSIONS",
    "EVALUATION",
    "INVALID",
    "UNSAID",
    "Agreement",
    "Consent",
    "Forms",
    "Item",
    "Learned",
    "Party",
    "Status",
    "agree",
    "chosen",
    "describe_form",
    "describe_mask",
    "describe_recorded",
    "evaluation_items",
    "executed_items",
    "invalid_items",
    "join",
    "propose",
    "protocol_items",
    "recorded_otherwise",
    "replan_items",
    "same_actions",
    "shared_slots",
]
