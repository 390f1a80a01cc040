"""Run a function of tensors as CUDA graphs, so that its kernels are launched at once and not one by one.

The first call with certain shapes is captured, later ones replay it: the same kernels on the same numbers, so
the result has the same bits as without a graph.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

WARM_UP = 3  # calls before a capture, in which libraries choose kernels and make their workspaces
MOST = 8  # graphs that are kept; each holds the memory of one call


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: Mapping[str, Tensor]
    output: Tensor
    weights: tuple[int, ...]
    """Where the weights were: a graph reads them there for ever."""


class CudaGraphs:
    """The captured graphs of one function of tensors and of the weights of `module`.

    The function must depend on nothing else than its tensors and the key that it is called with, wait for
    nothing that the GPU computes, and draw no random numbers. Modules that are put into `module` later are
    not seen: make this object last.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._modules = list(module.modules())  # walking the tree takes longer than a sampling step
        self._captured: dict[Hashable, _Captured] = {}
        self._pool: Any = None  # torch's handle of the memory that the graphs share

    def run(
        self, function: Callable[[Mapping[str, Tensor]], Tensor], inputs: Mapping[str, Tensor], key: Hashable
    ) -> Tensor:
        """Return `function(inputs)`. `key` is whatever decides its result beside the tensors."""
        shapes = tuple((name, value.shape, value.dtype) for name, value in inputs.items())
        weights = tuple(
            parameter.data_ptr()
            for module in self._modules
            for parameter in module._parameters.values()
            if parameter is not None
        )
        whole = (key, shapes, self._module.training)
        captured = self._captured.pop(whole, None)
        if captured is None or captured.weights != weights:
            captured = self._capture(function, inputs, weights)
        self._captured[whole] = captured  # the last used is the last that goes
        while len(self._captured) > MOST:
            del self._captured[next(iter(self._captured))]
        for name, value in captured.inputs.items():
            value.copy_(inputs[name], non_blocking=True)
        captured.graph.replay()
        return captured.output.clone()

    def _capture(
        self,
        function: Callable[[Mapping[str, Tensor]], Tensor],
        inputs: Mapping[str, Tensor],
        weights: tuple[int, ...],
    ) -> _Captured:
        inputs = {name: value.clone() for name, value in inputs.items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                function(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Another thread, such as a server's, may use the GPU meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = function(inputs)
        self._pool = self._pool or graph.pool()
        return _Captured(graph, inputs, output, weights)
