"""Record the GPU work of a function once and replay it, which saves the time of launching kernels one by one.

For a small model, Python needs longer to launch the kernels than the GPU needs to run them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

WARM_UP_CALLS = 3
"""Calls that run normally before the recording, so that compilation, cuBLAS workspaces and caches are not recorded."""


@dataclass
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    gradients: list[Tensor | None]


class CudaGraph:
    """Replays `work`, a forward and backward pass that sets the gradients of `parameters`.

    `work` takes and returns tensors on the GPU, never waits for the host, and allocates its gradients anew. `state`
    returns everything else that its launches depend on, besides the inputs' shapes: modes, and addresses of weights.
    After a change of state, the first calls run normally and the next one is recorded. Every replay draws new numbers
    from PyTorch's generator. The gradients belong to the recording, so the next replay overwrites them.
    """

    def __init__(
        self,
        work: Callable[..., tuple[Tensor, ...]],
        parameters: Iterable[nn.Parameter],
        state: Callable[[], Hashable],
    ) -> None:
        self._work, self._parameters, self._state = work, list(parameters), state
        self._calls: dict[Hashable, int] = {}
        self._recordings: dict[Hashable, _Recording] = {}
        self._stream = torch.cuda.Stream()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        key = (self._state(), *((t.shape, t.dtype) for t in inputs))
        recording = self._recordings.get(key)
        if recording is None:
            self._calls[key] = self._calls.get(key, 0) + 1
            if self._calls[key] <= WARM_UP_CALLS:
                return self._run_aside(*inputs)
            recording = self._recordings[key] = self._record(*inputs)
        for static, tensor in zip(recording.inputs, inputs):
            static.copy_(tensor)
        recording.graph.replay()
        for p, gradient in zip(self._parameters, recording.gradients):
            p.grad = gradient
        return tuple(output.clone() for output in recording.outputs)

    def _run_aside(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run `work` on the stream of the later recording, because autograd and the allocator remember the stream."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            outputs = self._work(*inputs)
        torch.cuda.current_stream().wait_stream(self._stream)
        return outputs

    def _record(self, *inputs: Tensor) -> _Recording:
        pool = next(iter(self._recordings.values())).graph.pool() if self._recordings else None
        graph = torch.cuda.CUDAGraph()
        inputs = tuple(tensor.clone() for tensor in inputs)
        with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
            outputs = self._work(*inputs)
        return _Recording(graph, inputs, outputs, [p.grad for p in self._parameters])
