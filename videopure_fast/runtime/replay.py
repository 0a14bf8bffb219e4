"""The CPU's counterpart of a captured CUDA graph: a call's operations, recorded once and run again in the same memory.

Python takes a fifth of the time of a small model's evaluation: each time it finds out anew what to compute on which
memory. A replay is one flat list of calls instead. During the recording, memory that is free again is reused.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..ops import native
from ..ops.backend import NAMESPACE, OPS

_ALIGNMENT = 64
_ARENA = 2**28  # bytes of address space; pages become memory when they are first written
_ATEN = torch.ops.aten
# Operators whose out= form computes the same bits as they do. Results of others are computed anew and then copied.
_INTO = {
    _ATEN.add.Tensor: _ATEN.add.out,
    _ATEN.addmm.default: _ATEN.addmm.out,
    _ATEN.cat.default: _ATEN.cat.out,
    _ATEN.mm.default: _ATEN.mm.out,
}


class Recording:
    """function(*tensors) -> tensors, recorded for tensors of these shapes on the CPU; a call computes it for others.

    The function must compute the same each time, read no value on the host, and make nothing that outlives it but its
    result. RuntimeError if it reads one, or needs more memory at once than a recording has. Threads that call at once
    are served one after another.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> None:
        self._function = function  # keeps the tensors that it refers to, and the calls read, alive
        self._lock = threading.Lock()
        with torch.no_grad():
            self._inputs = tuple(tensor.clone() for tensor in tensors)
            recorder = _Recorder()
            with recorder, native.recorded_to(recorder.calls):
                outputs = function(*self._inputs)
            self._outputs = tuple(recorder.arena.alias(output) for output in outputs)
        self._calls, self._arena = recorder.calls, recorder.arena

    def results(self) -> tuple[Tensor, ...]:
        """Copies of what the last call, or the recording itself, has computed."""
        return tuple(output.clone() for output in self._outputs)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        with self._lock:
            with torch.inference_mode():
                for place, tensor in zip(self._inputs, tensors, strict=True):
                    place.copy_(tensor)
                for call in self._calls:
                    call()
            return self.results()


def is_observed() -> bool:
    """Whether a compiler, a profiler, a function transform, or a mode that counts or changes operators is active.

    Each of them has to see the operators themselves, which a replay does not go through.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.autograd._profiler_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0  # this thread's; torch's own flag is that of all threads together
    )


class _Recorder(TorchDispatchMode):
    """Runs operators and records them: torch's own as they are, and in place of one of ours what its form calls.

    A form calls torch's operators, and the extension, whose calls `native.recorded_to` adds to the same list.
    """

    def __init__(self) -> None:
        super().__init__()
        self.arena = _Arena()
        self.calls: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == NAMESPACE:
            with self:
                return OPS[func.overloadpacket.__name__].run(*args, **kwargs)
        if func.overloadpacket is _ATEN.new_empty:
            return self.arena.allocate(torch.empty(args[1], dtype=kwargs.get("dtype") or args[0].dtype, device="meta"))
        result = func(*args, **kwargs)
        made, mutates = _memories(result), func._schema.is_mutable
        if not made:
            raise RuntimeError(f"{func} reads a value on the host")
        if made <= _memories((args, kwargs)) and not mutates:
            return result  # a view computes nothing
        # Recorded arguments are aliases, which do not keep their memory from being reused by later tensors.
        args, kwargs = tree_map_only(Tensor, self.arena.alias, (args, kwargs))
        if mutates:
            self.calls.append(partial(func, *args, **kwargs))
            return result
        places = tree_map_only(Tensor, lambda tensor: self.arena.allocate(tensor).copy_(tensor), result)
        aliases = tree_map_only(Tensor, self.arena.alias, places)
        if func in _INTO:
            self.calls.append(partial(_INTO[func], *args, **kwargs, out=aliases))
        else:
            self.calls.append(partial(_compute, func, args, kwargs, aliases))
        return places


def _memories(values: Any) -> set[int]:
    """The addresses of the storages of all tensors among the values."""
    return {value.untyped_storage().data_ptr() for value in tree_leaves(values) if isinstance(value, Tensor)}


def _compute(func: Callable[..., Any], args: Any, kwargs: Any, places: Any) -> None:
    for place, value in zip(tree_leaves(places), tree_leaves(func(*args, **kwargs)), strict=True):
        if isinstance(place, Tensor):
            place.copy_(value)


class _Arena:
    """The memory of a recording. A block of it is free again when the last tensor that uses it is gone."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _ARENA)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._blocks: dict[int, int] = {}  # offset -> size in bytes, of the blocks in use

    def allocate(self, like: Tensor) -> Tensor:
        """A tensor in the arena of the same dtype, shape and strides, with undefined values."""
        if not like.numel():
            return torch.empty(like.shape, dtype=like.dtype, device="cpu")
        reach = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
        size = -(-reach * like.itemsize // _ALIGNMENT) * _ALIGNMENT
        offset = 0
        for used in sorted(self._blocks):
            if used - offset >= size:
                break
            offset = used + self._blocks[used]
        if offset + size > _ARENA:
            raise RuntimeError(f"it needs more than {_ARENA >> 20} MiB at once")
        self._blocks[offset] = size
        # The tensor's storage owns `block`, so that it is finalized with the storage, after the last view is gone.
        block = (ctypes.c_byte * size).from_buffer(self._memory, offset)
        weakref.finalize(block, self._blocks.pop, offset).atexit = False
        return torch.frombuffer(block, dtype=like.dtype).as_strided(like.shape, like.stride())

    def alias(self, tensor: Tensor) -> Tensor:
        """The same values as a tensor that does not keep its block in use; a tensor outside the arena as it is."""
        start = tensor.data_ptr() - self._bytes.data_ptr()
        if not 0 <= start < _ARENA:
            return tensor
        return self._bytes.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), start // tensor.itemsize)
