"""Report what became of every tensor of a checkpoint, and the memory to run and to train the policy."""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from vlafit.checkpoints.assign import DTYPES, stored_as
from vlafit.checkpoints.formats.base import OpenedCheckpoint
from vlafit.nn.policy import Policy
from vlafit.policies import model_of
from vlafit.tuning import Plan
from vlafit.tuning.inject import make_groups

SHOWN = 8  # names of a kind that the text of a report shows; the report itself holds all
BYTES_TO_TRAIN = 16  # a trained fp32 parameter: weight, gradient, AdamW's two moments


@dataclass(frozen=True)
class LoadReport:
    """The fate of every tensor. `parts` counts parameters; `unused` and `tied` are the file's names.

    `stored` counts the file's tensors by dtype. `adapted` says, for a policy that is not sized as the
    checkpoint was, what was sliced, padded or is fresh; `notes` what else to know. `codec` says why there is
    no codec; it is empty where there is one.
    """

    path: str
    form: str
    family: str
    dtype: str
    parts: dict[str, int]
    bytes: int
    unused: tuple[str, ...]
    tied: tuple[str, ...]
    fresh: tuple[str, ...]
    """Weights that were drawn anew, those of which rows were among them."""
    fresh_rows: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    """The rows that were drawn anew, of weights of which the others are the file's."""
    used: int = 0
    stored: dict[str, int] = dataclasses.field(default_factory=dict)
    adapted: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()
    """Weights that have another shape in the file."""
    notes: tuple[str, ...] = ()
    codec: str = ""
    chunk: int | None = None
    """Steps of a chunk in the checkpoint's own files; None where they do not say."""
    statistics_of: str = ""
    """The base of adapters whose files give statistics and tokenizer; empty: the checkpoint's own do."""

    @property
    def owner(self) -> str:
        """Whose files give statistics and tokenizer, in words."""
        return f"the base {self.statistics_of}" if self.statistics_of else "the checkpoint"

    @property
    def parameters(self) -> int:
        """All parameters of the policy."""
        return sum(self.parts.values())

    @property
    def bytes_to_train(self) -> int:
        """Estimated memory to train every parameter in float32, activations not counted."""
        return self.parameters * BYTES_TO_TRAIN

    def text(self) -> str:
        """Return the report in a few lines."""
        parts = ", ".join(f"{part} {count:,}" for part, count in self.parts.items())
        stored = ", ".join(f"{count} in {dtype}" for dtype, count in self.stored.items())
        lines = [
            f"{self.path}: {self.form} checkpoint of {self.family}, loaded in {self.dtype}",
            f"{self.used} tensors used" + (f" (stored: {stored})" if stored else ""),
            f"{self.parameters:,} parameters: {parts}",
            f"memory: {self.bytes / 1e6:,.1f} MB of weights; to train all of them in fp32"
            f" {self.bytes_to_train / 1e6:,.1f} MB, activations not counted",
        ]
        fresh = [name + _rows(self.fresh_rows.get(name, ())) for name in self.fresh]
        for what, names in (("tied", self.tied), ("knowingly unused", self.unused), ("fresh", fresh)):
            if names:
                more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
                lines.append(f"{what} ({len(names)}): {', '.join(names[:SHOWN])}{more}")
        lines += [f"adapted: {change}" for change in self.adapted]
        lines += [f"note: {note}" for note in self.notes]
        if self.codec:
            lines.append(f"no codec: {self.codec}")
        return "\n".join(lines)

    def facts(self) -> dict[str, object]:
        """Return the report as plain values, the estimates included."""
        return json.loads(json.dumps(dataclasses.asdict(self))) | {
            "parameters": self.parameters,
            "bytes_to_train": self.bytes_to_train,
        }


def make_report(
    opened: OpenedCheckpoint,
    policy: Policy,
    dtype: str,
    fresh: Sequence[str],
    drawn: Mapping[str, Sequence[int]],
    changes: tuple[str, ...],
    resized: Mapping[str, torch.Size],
    plan: Plan | None,
    notes: tuple[str, ...],
    no_codec: str,
) -> LoadReport:
    """Return the report of a checkpoint whose tensors have been compared with its bare policy.

    `drawn` are weights of single embodiments that were drawn anew, with their rows where others are kept.
    """
    rows = {name: list(some) for name, some in drawn.items() if some and name not in fresh}
    fresh = list(dict.fromkeys([*fresh, *drawn]))
    parts: dict[str, int] = {}
    size = 0
    for info in policy.parts():
        count = policy.get_parameter(info.name).numel()
        parts[info.part] = parts.get(info.part, 0) + count
        size += count * stored_as(info, DTYPES[dtype]).itemsize
    used = {n: t for n, t in opened.tensors.weights.items() if n not in fresh or n in rows}
    return LoadReport(
        path=opened.path,
        form=opened.format.name,
        family=model_of(policy.config),
        dtype=dtype,
        parts=parts,
        bytes=size,
        unused=opened.tensors.unused,
        tied=opened.tensors.tied,
        fresh=tuple(fresh),
        fresh_rows=rows,
        used=len(used),
        stored=dict(Counter(str(t.dtype).removeprefix("torch.") for t in used.values())),
        adapted=changes,
        resized=tuple(resized),
        notes=(
            *notes,
            *([] if no_codec else _statistics(opened.statistics_of)),
            *_sampling(policy),
            *(_describe_plan(plan) if plan is not None else ()),
        ),
        codec=no_codec,
        statistics_of=opened.statistics_of,
        chunk=opened.chunk if isinstance(opened.chunk, int) else None,
    )


def _rows(numbers: Sequence[int]) -> str:
    one = "row" if len(numbers) == 1 else "rows"
    return f" ({one} {', '.join(map(str, numbers))})" if numbers else ""


def _statistics(base: str) -> list[str]:
    return [f"statistics are of the base {base}: the adapters have none of their own"] if base else []


def _sampling(policy: Policy) -> list[str]:
    own = type(policy).steps
    if policy.steps is None or policy.steps == own:
        return []
    return [f"samples actions in {policy.steps} steps, as its files say, not in the family's {own}"]


def _describe_plan(plan: Plan) -> list[str]:
    """Return notes about adapters and quantised weights."""
    notes = [
        f"adapter {group.name}: {group.adapter.method} on {len(group.layers)} layers"
        for group in make_groups(plan.adapted)
    ]
    if plan.quantised:
        methods = ", ".join(sorted(set(plan.quantised.values())))
        notes.append(f"{len(plan.quantised)} layers are held in {methods}")
    return notes
