"""CUDA graphs of whole calls, and work on a second stream."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# One capture at a time in a process: torch's allocator and random generators support no more.
_capturing = threading.Lock()


class GraphMemory:
    """Memory that graphs of one device share: no two of them may run at once.

    Torch gives memory of a stream to that stream alone, so that all are captured on the same one.
    """

    def __init__(self, device: torch.device) -> None:
        self.pool: Any = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)


class CudaGraph:
    """function(*tensors) -> tensors, captured for tensors of these shapes on a CUDA GPU; a call runs it for others.

    The graph reads and writes memory of its own: a call copies its inputs in, replays, and copies the outputs out.
    Threads that call at once are served one after another, also where each has a stream of its own. The function must
    launch the same kernels each time and read no value on the host. What it holds is kept alive.

    memory: what it shares with other graphs; None for memory of its own.
    """

    def __init__(
        self, function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor, memory: GraphMemory | None = None
    ) -> None:
        self._function = function
        self._lock = threading.Lock()
        self._copied_out = torch.cuda.Event()
        self._inputs = tuple(tensor.clone() for tensor in tensors)
        with torch.cuda.device(tensors[0].device):  # torch's default stream for captures may be another GPU's
            side, current = memory.stream if memory else torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                function(*self._inputs)  # compiles kernels and chooses algorithms, which a capture may not
            current.wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            # "thread_local": other threads may go on to allocate and synchronize while this one captures.
            pool = memory.pool if memory else None
            graph = torch.cuda.graph(self._graph, pool=pool, stream=side, capture_error_mode="thread_local")
            with _capturing, graph:
                self._outputs = function(*self._inputs)
            self._copied_out.record(current)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        with self._lock:
            stream = torch.cuda.current_stream(tensors[0].device)
            stream.wait_event(self._copied_out)  # the last caller's stream may still copy from this memory
            for place, tensor in zip(self._inputs, tensors, strict=True):
                place.copy_(tensor)
            self._graph.replay()
            outputs = tuple(output.clone() for output in self._outputs)
            self._copied_out.record(stream)
        return outputs


class SideStream:
    """On a CUDA GPU, a stream for work that depends on nothing enqueued after this line; elsewhere the usual order.

    Entering the block switches to it, and leaving lets the current stream wait for it. `hand_over` what the block has
    made before using it outside.
    """

    def __init__(self, device: torch.device) -> None:
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._side is not None:
            self._current = torch.cuda.current_stream(device)
            self._side.wait_stream(self._current)
            self._context = torch.cuda.stream(self._side)

    def __enter__(self) -> None:
        if self._side is not None:
            self._context.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._side is not None:
            self._context.__exit__(*error)
            self._current.wait_stream(self._side)

    def hand_over(self, tensor: Tensor) -> Tensor:
        """The tensor; its memory is not used again before the current stream's work on it is done."""
        if self._side is not None:
            tensor.record_stream(self._current)
        return tensor
