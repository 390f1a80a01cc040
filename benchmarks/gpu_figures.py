"""The figures that the project wants of a GPU: the row that measures each, and what it is to reach."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

COMPILED = "--set train.compile=blocks"
LOWEST = (  # bf16 is what a GPU computes in by itself; named, the rung can be tried on a CPU, too
    "--recompute full --states 8bit --set train.precision=bf16 train.weights=bf16 optim.in_backward=true"
)
FORECAST_ERROR = 0.1  # of the peak, either way; without train.compile, which lowers the peak
POLICIES = {"pi0": "pi0", "pi05": "pi0.5", "smolvla": "SmolVLA"}
STRATEGIES = ("full", "frozen-vision", "expert", "lora")
RUNGS = {"as it is": "", "recompute and 8-bit states": " --recompute full --states 8bit"}
BATCHES = (2, 4)
IDENTITY = ("size", "strategy", "shape", "recompute", "states", "set", "copies", "dtype", "mode")
"""What tells rows of different figures apart; batch, steps and calls do not."""


@dataclass(frozen=True)
class Aim:
    """Between which values a column of a row is to be."""

    column: str
    at_least: float = -math.inf
    at_most: float = math.inf
    card: str = ""
    """Part of the name of the card for which the aim was set; empty: of any."""

    @property
    def words(self) -> str:
        """Return the aim in words."""
        if self.at_least == self.at_most:
            bound = f"= {self.at_least:g}"
        elif math.isinf(self.at_most):
            bound = f">= {self.at_least:g}"
        elif math.isinf(self.at_least):
            bound = f"<= {self.at_most:g}"
        else:
            bound = f"{self.at_least:g} to {self.at_most:g}"
        return f"{self.column} {bound}{f' on {self.card}' if self.card else ''}"

    def met(self, row: Mapping[str, object]) -> str:
        """Tell whether `row` reaches the aim; empty where there is none for its card."""
        value = row.get(self.column)
        if not isinstance(value, float | int) or self.card not in str(row.get("card")):
            return ""
        return "yes" if self.at_least <= value <= self.at_most else "no"


@dataclass(frozen=True)
class Figure:
    """A row to measure: a command of another benchmark, and what it is to reach."""

    name: str
    benchmark: str
    """"train" or "act"."""
    words: str
    """Options of that benchmark, for one row."""
    aims: tuple[Aim, ...] = ()


def samples_per_s(least: float, card: str) -> tuple[Aim, ...]:
    """Return the aim of a speed of training on a card."""
    return (Aim("samples_per_s", least, card=card),)


FORECAST = Aim("forecast_error", -FORECAST_ERROR, FORECAST_ERROR)
FUSED = Aim("fused_kernels", 1)
"""Kernels of flash attention, torch's or cuDNN's, and not of the slower one that takes any mask."""
TF32 = Aim("fp32_product_error", 1e-5)
"""TF32 for what stays fp32: fp32's own error is near 1e-7."""
VARLEN = Aim("varlen", 1, 1)
"""Packed rows attend by flash attention over rows of any length."""

FIGURES = (
    Figure("pi0 full", "train", f"--strategies full --shapes padded {COMPILED}", samples_per_s(50, "H200")),
    Figure("pi0 full, LIBERO", "train", f"--strategies full --shapes libero {COMPILED}",
           samples_per_s(75, "H200")),
    Figure("pi0 expert", "train", f"--strategies expert --shapes padded {COMPILED}",
           samples_per_s(150, "H200")),
    Figure("pi0 LoRA", "train", f"--strategies lora --shapes padded {COMPILED}", samples_per_s(60, "H100")),
    Figure("pi0 acts, compiled", "act", "--sizes pi0 --modes compiled",
           (Aim("p50_ms", at_most=20, card="H200"), Aim("difference", at_most=2e-3))),
    Figure("pi0 acts, CUDA graph", "act", "--sizes pi0 --modes graph", (Aim("difference", 0, 0),)),
    Figure("pi0 full, in 24 GB", "train",
           f"--strategies full --shapes padded --batch 16 --limit 24 {LOWEST}",
           (Aim("peak_gb", at_most=24), FORECAST)),
    Figure("pi0 LoRA, in 9 GB", "train",
           "--strategies lora --shapes padded --batch 4 --limit 9 --recompute full --states 8bit",
           (Aim("peak_gb", at_most=9), FORECAST)),
    Figure("pi0 full, eager", "train", "--strategies full --shapes padded --profile",
           (FUSED, TF32, FORECAST)),
    Figure("pi0 full, LIBERO, eager", "train", "--strategies full --shapes libero --profile",
           (FUSED, FORECAST)),
    Figure("pi0 LoRA, eager", "train", "--strategies lora --shapes padded --profile", (FORECAST,)),
    Figure("pi0 expert, eager", "train", "--strategies expert --shapes padded --profile", (FORECAST,)),
    Figure("pi0 full, mixed cameras, packed", "train",
           "--strategies full --shapes mixed --batch 8 --recompute full --profile --set train.packing=rows",
           (VARLEN, FUSED, FORECAST)),
    Figure("pi0 full, mixed cameras, padded", "train",
           "--strategies full --shapes mixed --batch 8 --recompute full --profile --set train.packing=none",
           (FORECAST,)),
    Figure("pi0 expert, batches in pageable memory", "train",
           f"--strategies expert --shapes padded --copies pageable {COMPILED}"),
    Figure("pi0 full, bf16 weights", "train",
           "--strategies full --shapes padded --batch 16 --recompute full --states 8bit "
           "--set train.precision=bf16 train.weights=bf16", (FORECAST,)),
    Figure("pi0.5 full", "train", f"--sizes pi05 --strategies full --shapes padded {COMPILED}"),
    Figure("pi0.5 expert", "train", f"--sizes pi05 --strategies expert --shapes padded {COMPILED}"),
    Figure("pi0.5 LoRA", "train", f"--sizes pi05 --strategies lora --shapes padded {COMPILED}"),
    Figure("pi0.5 without the image tower", "train",
           f"--sizes pi05 --strategies frozen-vision --shapes padded {COMPILED}"),
    Figure("pi0.5 acts, compiled", "act", "--sizes pi05 --modes compiled",
           (Aim("difference", at_most=2e-3),)),
    Figure("pi0.5 acts, CUDA graph", "act", "--sizes pi05 --modes graph", (Aim("difference", 0, 0),)),
    Figure("SmolVLA full", "train", f"--sizes smolvla --strategies full --shapes padded {COMPILED}"),
    Figure("SmolVLA expert", "train", f"--sizes smolvla --strategies expert --shapes padded {COMPILED}"),
    Figure("SmolVLA LoRA", "train", f"--sizes smolvla --strategies lora --shapes padded {COMPILED}"),
    Figure("SmolVLA acts, compiled", "act", "--sizes smolvla --modes compiled",
           (Aim("difference", at_most=2e-3),)),
    Figure("SmolVLA acts, CUDA graph", "act", "--sizes smolvla --modes graph", (Aim("difference", 0, 0),)),
    Figure("pi0 acts, one kernel after the other", "act", "--sizes pi0 --modes eager"),
    Figure("pi0 acts in fp32, CUDA graph", "act", "--sizes pi0 --modes graph --dtypes float32",
           (Aim("difference", 0, 0),)),
    Figure("pi0 acts, int8", "act", "--sizes pi0 --modes int8"),
    Figure("pi0 acts, fp8", "act", "--sizes pi0 --modes fp8"),
)  # fmt: skip

FORECASTS = tuple(
    Figure(
        f"memory of {POLICIES[size]} {strategy}, {batch} samples, {rung}",
        "train",
        f"--sizes {size} --strategies {strategy} --shapes padded --batch {batch} --steps 3 --warm-up 2"
        + RUNGS[rung],
        (FORECAST,),
    )
    for size, strategy, batch, rung in itertools.product(POLICIES, STRATEGIES, BATCHES, RUNGS)
)
"""The forecast of memory over policies, strategies, batches and rungs."""
