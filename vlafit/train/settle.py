"""Settle the recipe's automatic values once: the recipe's own value, then the launcher's, then the default.

A run writes the settled recipe into its folder. A resumed run keeps what it began with, because any of these
values may change the last bits of a weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch

from vlafit.agreement import Item
from vlafit.recipe import OptimRecipe, Recipe
from vlafit.train.launch_plan import LaunchPlan

EARLIER: Mapping[str, object] = {  # what runs did before their recipes had the field
    "train.precision": "fp32", "train.sharding": "none", "train.accumulate": 1, "train.frozen": "fp32",
    "train.recompute": "none", "optim.states": "fp32", "train.weights": "fp32", "optim.in_backward": False,
    "train.compile": "none", "train.packing": "none", "train.replicas": 1,
}  # fmt: skip
LEFT_TO_MEMORY = {  # what train.memory decides where neither recipe nor launcher does
    "train.accumulate": 0, "train.recompute": "auto", "optim.states": "auto", "train.weights": "auto",
    "optim.in_backward": "auto",
}  # fmt: skip
CHOSEN_LATER = (  # from policy and data; a resumed run keeps them
    "train.batch_size",
    "train.checkpoints",
    "train.packing",
)
CLIP_NORM = next(field.default for field in fields(OptimRecipe) if field.name == "clip_norm")


@dataclass(frozen=True)
class Setting:
    """A value on which the recipe, or the run that is resumed, and the launcher have something to say."""

    field: str
    sides: Mapping[str, str]
    """Who says what: "recipe", "run" and "launcher"."""
    value: str
    source: str
    """Who decided, for messages."""

    @property
    def differs(self) -> bool:
        """Whether the sides contradict one another."""
        return len(set(self.sides.values())) > 1

    @property
    def sentence(self) -> str:
        """Return one sentence that says which value holds."""
        others = "; ".join(f"{side}: {value}" for side, value in self.sides.items())
        return f"{self.field} = {self.value} holds, by {self.source} ({others})"

    def item(self) -> Item:
        """Return the line of the agreement."""
        status = "chosen" if self.differs else "same"
        return Item(self.field, self.sides, self.value, status, f"by {self.source}")


@dataclass(frozen=True)
class Settled:
    """A recipe without automatic values, and what the launcher had to do with them."""

    recipe: Recipe
    settings: tuple[Setting, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def sentences(self) -> tuple[str, ...]:
        """A sentence about it for the log."""
        return (*(setting.sentence for setting in self.settings), *self.notes)


def has_bf16(device: torch.device) -> bool:
    """Tell whether the device computes in bfloat16 at full speed."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def allow_tf32(device: torch.device, precision: str) -> None:
    """Let a GPU of a run in bf16 compute products of what stays fp32 in TF32."""
    if device.type == "cuda" and precision == "bf16":
        torch.set_float32_matmul_precision("high")


def settle(
    recipe: Recipe,
    launch: LaunchPlan,
    *,
    bf16: bool,
    workers: int = 0,
    saved: Recipe | None = None,
    open_fields: bool = False,
) -> Settled:
    """Return the recipe with every automatic value decided, for a device with or without `bf16`, and with
    that many dataloader workers, which change no result and may be others where a run is resumed.

    `saved` is the recipe of the run that is resumed; without one, an automatic batch stays so. With
    `open_fields` the values that `train.memory` decides stay automatic where neither recipe nor launcher sets
    them.
    """
    settings: list[Setting] = []
    if recipe.data.workers == "auto":
        recipe = with_field(recipe, "data.workers", workers)
    before = None if saved is None else earlier(saved)
    asked = {
        "train.precision": launch.precision,
        "train.sharding": launch.sharding,
        "train.replicas": launch.replicas,
        "train.accumulate": launch.accumulate,
        "train.recompute": launch.recompute,
        "train.compile": launch.compile,
    }
    precision = "bf16" if bf16 else "fp32"
    defaults = {**EARLIER, "train.precision": precision}
    if open_fields:
        defaults |= LEFT_TO_MEMORY
    for field in (name for name in EARLIER if name not in CHOSEN_LATER):
        own, launched = field_of(recipe, field), asked.get(field)
        if field == "train.frozen":  # rounding them changes nothing that a bf16 product sees
            defaults[field] = field_of(recipe, "train.precision")
        sides = {} if is_automatic(own) else {"recipe": str(own)}
        source = "the recipe"
        if is_automatic(own):
            if before is not None:
                own, source = field_of(before, field), "the run that is resumed"
                sides = {"run": str(own)}
            elif launched is not None:
                own, source = launched, launch.launcher
            else:
                own = defaults[field]
        if launched is not None:
            settings.append(Setting(field, {**sides, "launcher": str(launched)}, str(own), source))
        recipe = with_field(recipe, field, own)
    for field in CHOSEN_LATER:
        if field_of(recipe, field) == "auto" and before is not None:
            recipe = with_field(recipe, field, field_of(before, field))
    recipe = _clip_norm(recipe, launch, before, settings)
    notes = launch.notes
    if launch.launcher and launch.precision is None and bf16 and before is None:
        held = field_of(recipe, "train.precision")
        notes += (
            f"train.precision = {held} holds: {launch.launcher} says mixed_precision 'no', which is also "
            "what it writes where nobody chose",
        )
    return Settled(recipe, tuple(settings), notes)


def _clip_norm(recipe: Recipe, launch: LaunchPlan, before: Recipe | None, settings: list[Setting]) -> Recipe:
    own, launched = recipe.optim.clip_norm, launch.clip_norm
    if launched is None:
        return recipe
    sides, source = {"recipe": str(own)}, "the recipe"
    if before is not None and own == CLIP_NORM:
        own, sides, source = before.optim.clip_norm, {"run": str(before.optim.clip_norm)}, "the run"
    elif own == CLIP_NORM:
        own, sides, source = launched, {}, launch.launcher
    settings.append(Setting("optim.clip_norm", {**sides, "launcher": str(launched)}, str(own), source))
    return with_field(recipe, "optim.clip_norm", own)


def earlier(saved: Recipe) -> Recipe:
    """Return a run's saved recipe with the values that the run had where its version had no such field.

    A run writes a settled recipe, so an automatic value in it is a field that did not exist.
    """
    for field, value in EARLIER.items():
        if is_automatic(field_of(saved, field)):
            saved = with_field(saved, field, value)
    return saved


def is_automatic(value: object) -> bool:
    """Tell whether a field's value leaves it open; false does not."""
    return value == "auto" or (value == 0 and not isinstance(value, bool))


def field_of(recipe: Recipe, field: str) -> object:
    """Return the value of a field by its dotted name."""
    section, name = field.split(".")
    return getattr(getattr(recipe, section), name)


def with_field(recipe: Recipe, field: str, value: object) -> Recipe:
    """Return the recipe with another value in a field, by its dotted name."""
    section, name = field.split(".")
    return replace(recipe, **{section: replace(getattr(recipe, section), **{name: value})})
