"""What a checkpoint says of the data that it learned from: of how a card read its frames and values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlafit.agreement.values import FILE, Agreement


@dataclass(frozen=True)
class Learned:
    """Statements of one embodiment's data."""

    said: Mapping[str, str] = field(default_factory=dict)
    """Item of the agreement -> what the dataset's side says; the empty ones left out."""
    cameras: tuple[str, ...] = ()
    """The dataset's camera for each slot of the policy; empty where it is not said, or of several
    embodiments."""
    silence: str = "the checkpoint does not say"
    """Why an item that is not in `said` is not."""

    @classmethod
    def of(cls, agreement: Agreement | None, embodiment: str = "") -> "Learned":
        """Return what an agreement says of the data of `embodiment`, one of several or the only one.

        None, of a checkpoint without an agreement, says nothing.
        """
        if agreement is None:
            return cls()
        mine = f"{embodiment}: "
        said = {item.name.removeprefix(mine): item.sides.get("dataset", "") for item in agreement.items}
        return cls(
            {name: text for name, text in said.items() if text},
            agreement.cameras,
            f"its {FILE} has no such row: an older vlafit wrote it, or somebody deleted the row",
        )

    def to_json(self) -> dict[str, object]:
        """Return what `from_json` reads: what is said of how cards read frames and values, and no more."""
        said = {name: text for name, text in self.said.items() if _is_reading(name)}
        return {"said": said, "cameras": list(self.cameras), "silence": self.silence}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Learned":
        """Return what `to_json` wrote. Raises TypeError, KeyError or AttributeError for anything else."""
        said, cameras, silence = dict(content["said"]), tuple(content["cameras"]), content["silence"]
        for text in (*said, *said.values(), *cameras, silence):
            if not isinstance(text, str):
                raise TypeError(f"{text!r} is no text")
        return cls(said, cameras, silence)

    def by_camera(self, sources: Mapping[str, str], slots: Sequence[str]) -> dict[str, str]:
        """Return `sources`, a policy's slot -> camera, with the learned data's camera in place of the slot.

        `slots` are those of the policy in order: openpi's have names of their own, so that only the place of
        a slot tells which camera filled it.
        """
        if not self.cameras or {slot for slot in sources if slot} <= set(self.cameras):
            return dict(sources)
        filled = dict(zip(slots, self.cameras, strict=False))
        return {filled[slot]: source for slot, source in sources.items() if filled.get(slot)}


def _is_reading(name: str) -> bool:
    whole = ("frames", "relative actions")
    return name in whole or "camera " in name or name.endswith((" columns", " conversion"))


UNSAID = Learned()
"""Of a checkpoint without an agreement."""
