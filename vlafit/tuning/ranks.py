"""AdaLoRA's rank schedule (arXiv 2303.10512): which singular values each layer keeps during training.

Each triplet of singular vectors is scored by smoothed |weight x gradient|; periodically the least important
triplets of all layers together are zeroed, until the mean rank is the target. Between prunings a zeroed value
may grow again, except in the final phase. peft has this schedule for models that train in one stage; here
layers may start and stop training in any stage of a strategy:

- A layer's clock starts when it is first trained and ends with the run, or with the stage that freezes it
(which
  may come sooner if it waits for a plateau). Layers with equal clocks share one budget.
- The clock is the finished share of the run: by steps, or by time if there is a time limit and it is further.
  By steps, a resumed run is bit-identical. By time it resumes at the same share, but at its own pace, as the
  learning rate does.
- A frozen layer keeps its current rank.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vlafit.errors import TrainingError
from vlafit.tuning.adapters import Adapter
from vlafit.tuning.inject import make_groups
from vlafit.tuning.plan import Plan

WARM, SETTLE = 0.1, 0.3  # shares of a layer's time before and after the budget falls
PRUNINGS = 50  # at most, evenly spread between the two
SMOOTHING = 0.85  # of sensitivity and of its uncertainty: beta1 and beta2, section 4.1 of the paper


@dataclass(frozen=True)
class Clock:
    """When a layer's training starts and ends, in optimiser steps and in shares of a time budget."""

    began: int
    began_spent: float
    ends: int
    ends_spent: float
    """Infinite if a step ends it, whatever the time."""

    def done(self, step: int, spent: float) -> float:
        """Return the finished share after `step` steps or `spent` of the time, whichever is larger."""
        by_steps = (step - self.began) / max(1, self.ends - self.began)
        by_time = (spent - self.began_spent) / max(1e-9, self.ends_spent - self.began_spent)
        return max(by_steps, by_time)


@dataclass(frozen=True)
class Layer:
    """One adapted layer: its factors, their importance, and the ranks it keeps."""

    tensors: Mapping[str, Tensor]  # A [r, in], B [out, r], E [r, 1]
    sensitivity: Mapping[str, Tensor]  # of the same shapes
    uncertainty: Mapping[str, Tensor]
    kept: Tensor  # bool [r]: at the last pruning
    clock: Clock
    prunings: int = 0

    @torch.no_grad()
    def score(self) -> None:
        """Update the scores from the gradients of the last step."""
        for key, tensor in self.tensors.items():
            assert tensor.grad is not None
            now = (tensor * tensor.grad).abs()
            mean = self.sensitivity[key].lerp_(now, 1 - SMOOTHING)
            self.uncertainty[key].lerp_((now - mean).abs(), 1 - SMOOTHING)

    def importance(self) -> Tensor:
        """Return the score of each triplet [r]: its value's, plus the means of its vectors' scores."""
        a, b, e = (self.sensitivity[key] * self.uncertainty[key] for key in "ABE")
        return e[:, 0] + a.mean(1) + b.mean(0)


def rank_schedule(policy: nn.Module, plan: Plan) -> "RankSchedule | None":
    """Return the schedule of the plan's AdaLoRA adapters, of any stage; None if there are none."""
    groups = [g for g in make_groups(plan.adapted) if g.adapter.method == "adalora"]
    return RankSchedule(policy, groups[0].name, groups[0].adapter) if groups else None


class RankSchedule:
    """Lowers the ranks of the AdaLoRA adapters called `name` in `policy`, stage after stage."""

    def __init__(self, policy: nn.Module, name: str, adapter: Adapter) -> None:
        self.adapter = adapter
        tensors, end = dict(policy.named_parameters()), f".lora_E.{name}"
        layers = [key.removesuffix(end) for key in tensors if key.endswith(end)]
        self._names = {x: {key: f"{x}.lora_{key}.{name}" for key in "ABE"} for x in layers}
        self._tensors = {x: {key: tensors[n] for key, n in names.items()} for x, names in self._names.items()}
        self._device = next(policy.parameters()).device
        self._begun: dict[str, Layer] = {}  # layers that are trained, or were
        self._learning: list[str] = []
        self._pruned: set[str] = set()  # by the last step

    def enter(self, plan: Plan, *, steps: int, step: int, spent: float = 0.0) -> None:
        """Enter the plan's stage in a run of `steps`, after `step` of them and `spent` of its time.

        Layers that the stage freezes keep their current ranks.
        """
        ends = _ends(plan, steps)
        for name in self._learning:
            if name not in ends:
                _prune(self._begun[name].tensors["E"], self._begun[name].kept)
        for name, (last, last_spent) in ends.items():
            layer = self._begun.get(name) or self._new(name, step, spent)
            clock = replace(layer.clock, ends=last, ends_spent=last_spent)
            self._begun[name] = replace(layer, clock=clock)
        self._learning, self._pruned = list(ends), set()

    def _new(self, name: str, step: int, spent: float) -> Layer:
        tensors = self._tensors[name]
        zeros = [{key: torch.zeros_like(t, requires_grad=False) for key, t in tensors.items()} for _ in "su"]
        kept = torch.ones(len(tensors["E"]), dtype=torch.bool, device=tensors["E"].device)
        return Layer(tensors, zeros[0], zeros[1], kept, Clock(step, spent, step, spent))

    def penalty(self) -> Tensor:
        """Return the mean distance of singular vectors from orthogonality, times its weight: a scalar."""
        grams = [g for name in self._learning for g in _grams(self._begun[name].tensors)]
        if not grams:
            return torch.zeros((), device=self._device)
        return self.adapter.orthogonal * torch.stack([_from_orthogonal(gram) for gram in grams]).mean()

    def after_step(self, step: int, spent: float = 0.0) -> None:
        """Update scores after optimiser step number `step` (from 1), and prune when it is due.

        `spent` is the used share of a time budget. Call it after the optimiser's step, before the gradients
        are cleared. Raises TrainingError if a trained tensor has no gradient.
        """
        self._pruned = set()
        self._require_gradients()
        pools: dict[Clock, list[str]] = {}
        for name in self._learning:
            pools.setdefault(self._begun[name].clock, []).append(name)
        for clock, names in pools.items():
            done, layers = clock.done(step, spent), [self._begun[name] for name in names]
            fallen = (done - WARM) / (1 - WARM - SETTLE)
            if fallen < 1 or not any(layer.prunings for layer in layers):
                for layer in layers:
                    layer.score()
            number = math.floor(min(1.0, fallen) * PRUNINGS)
            if number > min(layer.prunings for layer in layers) or fallen >= 1:
                self._allocate(names, min(1.0, fallen), number)

    def _allocate(self, names: list[str], fallen: float, number: int) -> None:
        """Keep the most important triplets of all layers in `names` together, and zero the others."""
        layers, ranks = [self._begun[name] for name in names], self.adapter
        mean = ranks.target_rank + (ranks.rank - ranks.target_rank) * (1 - fallen) ** 3  # equation 12
        scores = torch.cat([layer.importance() for layer in layers])
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept[scores.argsort(descending=True, stable=True)[: int(mean * len(layers))]] = True
        for name, layer, mine in zip(names, layers, kept.split([len(x.kept) for x in layers]), strict=True):
            self._begun[name] = replace(layer, kept=mine.clone(), prunings=number)
            _prune(layer.tensors["E"], mine)
        self._pruned = self._pruned | set(names)

    def prune(self, average: Mapping[str, Tensor]) -> None:
        """Zero in an EMA, by tensor name, what the last step pruned; otherwise it would only fade."""
        for name in self._pruned:
            if (kept := average.get(self._names[name]["E"])) is not None:  # else in another process
                _prune(kept, self._begun[name].kept)

    def _require_gradients(self) -> None:
        missing = [
            self._names[name][key]
            for name in self._learning
            for key, tensor in self._tensors[name].items()
            if tensor.grad is None
        ]
        if missing:
            raise TrainingError(
                f"AdaLoRA: {len(missing)} of its tensors have no gradient, such as {missing[0]}; freeze them "
                'by a rule before the one with mode = "adalora"'
            )

    def ranks(self) -> dict[str, int]:
        """Return how many singular values each layer that was trained kept at its last pruning."""
        if not self._begun:
            return {}
        counts = torch.stack([layer.kept.sum() for layer in self._begun.values()]).tolist()
        return dict(zip(self._begun, counts, strict=True))

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that resuming needs, by name."""
        state: dict[str, Tensor] = {}
        for name, layer in self._begun.items():
            clock = layer.clock
            facts = [float(clock.began), clock.began_spent, float(layer.prunings)]
            state[f"clock/{name}"] = torch.tensor(facts, dtype=torch.float64)
            state[f"kept/{name}"] = layer.kept
            for key in "ABE":
                state[f"sensitivity.{key}/{name}"] = layer.sensitivity[key]
                state[f"uncertainty.{key}/{name}"] = layer.uncertainty[key]
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of `state` in the same stage. Raises TrainingError if it does not match."""
        names = [key.partition("/")[2] for key in state if key.startswith("clock/")]
        self._require_matching(names, state)
        for name in names:
            began, spent, prunings = state[f"clock/{name}"].tolist()
            layer = self._begun.get(name) or self._new(name, int(began), spent)
            for key in "ABE":
                layer.sensitivity[key].copy_(state[f"sensitivity.{key}/{name}"])
                layer.uncertainty[key].copy_(state[f"uncertainty.{key}/{name}"])
            layer.kept.copy_(state[f"kept/{name}"])
            clock = replace(layer.clock, began=int(began), began_spent=spent)
            self._begun[name] = replace(layer, clock=clock, prunings=int(prunings))

    def _require_matching(self, names: Collection[str], state: Mapping[str, Tensor]) -> None:
        expected = {f"{key}/{name}" for key in _STORED for name in names}
        wrong = sorted(expected ^ {*state}) + [name for name in names if name not in self._tensors]
        wrong += [name for name in self._learning if name not in names]
        if wrong:
            raise TrainingError(
                f"the stored AdaLoRA scores do not match this policy and version: {wrong[:3]}; start a new "
                "run with --out"
            )


_STORED = ("clock", "kept", *(f"{what}.{key}" for what in ("sensitivity", "uncertainty") for key in "ABE"))


def _ends(plan: Plan, steps: int) -> dict[str, tuple[int, float]]:
    """Return the AdaLoRA layers trained in the stage, with the step and share of time at which they stop."""
    ends: dict[str, tuple[int, float]] = dict.fromkeys(_learning(plan), (steps, 1.0))
    going = set(ends)
    for number, stage in enumerate(plan.strategy.stages[plan.stage + 1 :], plan.stage + 1):
        begin = stage.begin
        stays = going & set(_learning(plan.at(number)))
        at = begin.at_step(steps) if begin is not None else None
        for name in going - stays:
            if begin is not None and at is not None:
                ends[name] = (at, math.inf if begin.fraction is None else begin.fraction)
        going = stays
    return ends


def _learning(plan: Plan) -> Iterable[str]:
    """Return the AdaLoRA layers trained in the plan's stage, in the policy's order."""
    adalora = {layer for layer, adapter in plan.adapted.items() if adapter.method == "adalora"}
    trained = dict.fromkeys(
        e.adapts.removesuffix(".weight") for e in plan.entries if e.adapts and e.trainable
    )
    return [layer for layer in trained if layer in adalora]


@torch.no_grad()
def _prune(values: Tensor, kept: Tensor) -> None:
    values.masked_fill_(~kept[:, None], 0.0)


def _grams(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    return tensors["A"] @ tensors["A"].T, tensors["B"].T @ tensors["B"]


def _from_orthogonal(gram: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype))
