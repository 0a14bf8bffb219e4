"""A CPU's counterpart of a captured CUDA graph: what a call computes, recorded once and run again in the same memory.

Of a small model's evaluation a fifth is Python, which finds out each time what to compute on which memory. A replay
does it without: one flat list of calls. Memory is handed on during the recording as it would be by an allocator.
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

_ALIGNMENT = 64
_ARENA = 2**28  # bytes of addresses; only what is used becomes memory
_ATEN = torch.ops.aten
# Operators that write into given memory as they do into their own; others are computed and then copied.
_INTO = {
    _ATEN.add.Tensor: _ATEN.add.out,
    _ATEN.addmm.default: _ATEN.addmm.out,
    _ATEN.cat.default: _ATEN.cat.out,
    _ATEN.mm.default: _ATEN.mm.out,
}


class Recording:
    """function(x) -> tensors, recorded for an x of this shape on the CPU; a call runs it again for another.

    The function must compute the same each time, read no value on the host, and make nothing that outlives it but its
    result. RuntimeError if it reads one, or needs more memory at once than a recording has. Threads that call at once
    are served one after another.
    """

    tables: Any = ()  # for the maker to keep alive

    def __init__(self, function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> None:
        self._function = function  # what it holds stays where the calls look for it
        self._lock = threading.Lock()
        with torch.no_grad():
            self._x = x.clone()
            recorder = _Recorder()
            with recorder, native.recorded_to(recorder.calls):
                outputs = function(self._x)
            self._outputs = tuple(recorder.arena.alias(output) for output in outputs)
        self._calls, self._arena = recorder.calls, recorder.arena

    def results(self) -> tuple[Tensor, ...]:
        """What the last call, or the recording itself, has computed."""
        return tuple(output.clone() for output in self._outputs)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        with self._lock:
            with torch.inference_mode():
                self._x.copy_(x)
                for call in self._calls:
                    call()
            return self.results()


class _Recorder(TorchDispatchMode):
    """Runs torch's operators and notes them; the extension's calls note themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = _Arena()
        self.calls: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket is _ATEN.new_empty:
            return self.arena.allocate(torch.empty(args[1], dtype=kwargs.get("dtype") or args[0].dtype, device="meta"))
        result = func(*args, **kwargs)
        made, mutates = _memories(result), func._schema.is_mutable
        if not made:
            raise RuntimeError(f"{func} reads a value on the host")
        if made <= _memories((args, kwargs)) and not mutates:
            return result  # a view, which stays what it is
        # Calls are noted on aliases, so that they keep no memory from being handed on.
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
    """The storages of all tensors among the values."""
    return {value.untyped_storage().data_ptr() for value in tree_leaves(values) if isinstance(value, Tensor)}


def _compute(func: Callable[..., Any], args: Any, kwargs: Any, places: Any) -> None:
    for place, value in zip(tree_leaves(places), tree_leaves(func(*args, **kwargs)), strict=True):
        if isinstance(place, Tensor):
            place.copy_(value)


class _Arena:
    """Memory of a recording. A block is free again when the last tensor that lives in it is gone."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _ARENA)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._blocks: dict[int, int] = {}  # offsets and sizes of those in use

    def allocate(self, like: Tensor) -> Tensor:
        """Memory for a tensor of the same dtype, shape and strides; its values are whatever lies there."""
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
        # The tensor's storage owns this object: the block's end is the storage's end, whatever views there were.
        block = (ctypes.c_byte * size).from_buffer(self._memory, offset)
        weakref.finalize(block, self._blocks.pop, offset).atexit = False
        return torch.frombuffer(block, dtype=like.dtype).as_strided(like.shape, like.stride())

    def alias(self, tensor: Tensor) -> Tensor:
        """The same memory by a tensor that does not keep its block in use; one from elsewhere as it is."""
        start = tensor.data_ptr() - self._bytes.data_ptr()
        if not 0 <= start < _ARENA:
            return tensor
        return self._bytes.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), start // tensor.itemsize)
