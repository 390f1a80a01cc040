"""Peak training memory and its breakdown (main process only).

On CUDA the peak is the allocator's; on a CPU it is the process's resident set, of which the program itself
(interpreter, torch, open data) is a large part, and therefore reported separately.
"""

import resource
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from vlafit.train.distributed import local
from vlafit.train.ema import Ema
from vlafit.train.piecewise_adamw import PiecewiseAdamW
from vlafit.tuning.quantise import stored_bytes

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): resets the process's peak resident set
PARTS = ("weights", "gradients", "optimiser", "average")


class MemoryMeter:
    """Measures peak memory while it runs; it is paused during rollouts, which load a second policy.

    Where a process cannot reset its peak (anything but Linux), the peak is that of the process's whole life,
    and `exact` is False.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.program = resident()
        self._peaks: dict[str, int] = {}
        self._exact = True
        self._running = False

    def start(self) -> None:
        """Reset the peak and start measuring."""
        self._running = True
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            CLEAR.write_text(RESET_PEAK)
        except OSError:
            self._exact = False

    def pause(self) -> None:
        """Record the peak so far and stop measuring until `start`."""
        if self._running:
            self._record()
            self._running = False

    def _record(self) -> None:
        now = {"rss": peak_resident()}
        if self.device.type == "cuda":
            now["allocated"] = torch.cuda.max_memory_allocated(self.device)
            now["reserved"] = torch.cuda.max_memory_reserved(self.device)
        self._peaks = {name: max(value, self._peaks.get(name, 0)) for name, value in now.items()}

    def values(
        self, policy: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None
    ) -> dict[str, float]:
        """Return the peak so far and its parts in GB (10^9 bytes), as metrics; it goes on measuring."""
        self._record()
        peak, parts = self._split(policy, optimizer, ema)
        kinds = {f"train/memory/{name}_gb": size / 1e9 for name, size in parts.items()}
        return {"train/peak_memory_gb": peak / 1e9, **kinds}

    def facts(
        self, policy: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None
    ) -> dict[str, object]:
        """Return the peaks and their parts in bytes, for run.json; call it after training.

        `peak` is the allocated memory on CUDA, and the resident set on a CPU. `rest` is what the parts do not
        explain: activations, buffers and, on a CPU, fragmentation. `program` is the resident set before the
        policy was built; it only counts on a CPU.
        """
        peak, parts = self._split(policy, optimizer, ema)
        return {"peak": peak, "exact": self._exact, **self._peaks, "parts": parts}

    def _split(
        self, policy: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None
    ) -> tuple[int, dict[str, int]]:
        parts = parts_of(policy, optimizer, ema)
        cuda = self.device.type == "cuda"
        peak = self._peaks.get("allocated" if cuda else "rss", 0)
        known = sum(parts.values())
        parts["program"] = 0 if cuda else min(self.program, max(0, peak - known))  # it may have shrunk since
        parts["rest"] = max(0, peak - sum(parts.values()))
        return peak, parts


def parts_of(policy: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None) -> dict[str, int]:
    """Return the bytes of weights, gradients of what is trained, optimiser states and EMA."""
    tensors = [*policy.parameters(), *policy.buffers()]
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    states = [
        value
        for parameter, state in optimizer.state.items()
        for value in state.values()
        if isinstance(value, Tensor) and value.device == parameter.device  # not kept on the host
    ]
    averages = list(ema.average.values()) if ema is not None else []
    sizes = (sum(map(_bytes, of)) for of in (tensors, trained, states, averages))
    parts: dict[str, int] = dict(zip(PARTS, sizes, strict=True))
    if isinstance(optimizer, PiecewiseAdamW) and optimizer.frees_gradients:  # one exists at a time
        parts["gradients"] = max(map(_bytes, trained))
    return parts


def _bytes(tensor: Tensor) -> int:
    return stored_bytes(local(tensor))


def resident() -> int:
    """Return this process's resident set in bytes, or its peak if only that is known."""
    return _status("VmRSS") or peak_resident()


def peak_resident() -> int:
    """Return the peak of this process's resident set in bytes, since it was last reset."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: getrusage(2) of the two systems
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(name: str) -> int:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def larger(
    first: Mapping[str, object] | None, second: Mapping[str, object] | None
) -> Mapping[str, object] | None:
    """Return the facts with the higher peak; a resumed run has several."""

    def peak(facts: Mapping[str, object]) -> float:
        value = facts.get("peak")
        return float(value) if isinstance(value, int | float) else 0.0

    return max((facts for facts in (first, second) if facts), key=peak, default=None)
