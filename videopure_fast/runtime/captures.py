"""Captured calls: a function that comes again with the same shape runs as one CUDA graph, or as a replay on the CPU."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..ops import backend
from .cuda_graph import CudaGraph, GraphMemory
from .replay import Recording, is_observed

Function = Callable[..., tuple[Tensor, ...]]  # of tensors
Value = TypeVar("Value")

_MOST_CAPTURES = 4  # each keeps the activations of its shape
# On the CPU: calls of a shape before it is recorded, and before it is recorded once more after it was pushed out.
_CALLS_BEFORE, _CALLS_BEFORE_ANOTHER, _MOST_WAITING = 1, 16, 64
# Values of the first activation above which a replay does not pay: the operations take far longer than their calls.
_MOST_REPLAYED = 2**19


class Recent(Generic[Value]):
    """The `most` values that were set or used last, by key. Threads may use it at once. A copy is empty."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def __setitem__(self, key: Hashable, value: Value) -> None:
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            if len(self._values) > self._most:
                self._values.popitem(last=False)

    def get(self, key: Hashable) -> Value | None:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def get_or_make(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of a key, made if it is not there; once, whatever the number of threads that ask."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
            value = make()
            self[key] = value
            return value

    def values(self) -> list[Value]:
        with self._lock:
            return list(self._values.values())

    def clear(self) -> None:
        with self._lock:
            self._values.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return Recent, (self._most,)


class Captures:
    """Runs functions, and captures those that come again.

    The key of a captured call is the function object itself, with the shape, dtype, device, backends and threads; so a
    function is a prepared object that computes the same each time. It must neither read a tensor on the host nor draw
    random numbers, and whatever it needs must have been made before: captured memory is reused by the next replay.
    Threads may call at once. A copy holds no captures.

    most: kept captures; the one used longest ago goes first. one_thread: no two calls come at once, so that graphs on a
    GPU share their memory.
    """

    def __init__(self, most: int = _MOST_CAPTURES, *, one_thread: bool = False) -> None:
        self._most, self._one_thread = most, one_thread
        self._memory: GraphMemory | None = None
        self._lock = threading.RLock()
        self.made: Recent[CudaGraph | Recording | None] = Recent(most)  # None: it could not be captured
        self._waiting: Recent[int] = Recent(_MOST_WAITING)  # calls that are still to come before a recording

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(Captures, self._most, one_thread=self._one_thread), ()

    def clear(self) -> None:
        """Drop all captures: what they were made of has changed."""
        with self._lock:
            self.made.clear()
            self._waiting.clear()
            self._memory = None  # memory of no graph is given back, and its handle with it

    @property
    def records_next(self) -> bool:
        """Whether a call that has run once is recorded on the CPU when it comes again."""
        return 0 in self._waiting.values()

    def __call__(
        self, function: Function, x: Tensor, *others: Tensor, first_activation: int | None
    ) -> tuple[Tensor, ...]:
        """function(x, *others) of tensors without gradients; a graph on a GPU, a replay on the CPU where that pays.

        first_activation: values of the function's first activation, which tell how large its operations are; None where
        they cannot be replayed on the CPU. A recording takes longer than a call, so only a call that comes again is
        recorded. What cannot be captured runs as it is, after one warning.
        """
        if not x.is_cuda and not _replay_pays(x, first_activation):
            return function(x, *others)
        layouts = tuple((tuple(one.shape), one.dtype, one.device) for one in (x, *others))
        key = (function, backend.in_use(), torch.get_num_threads(), layouts)
        with self._lock:  # while one thread captures, the others wait: they may want the same
            if key in self.made:
                captured = self.made.get(key)
            elif not x.is_cuda and (calls := self._waiting.get_or_make(key, lambda: _CALLS_BEFORE)):
                self._waiting[key] = calls - 1
                captured = None
            else:
                captured = self._capture(key, function, x, *others)
                if isinstance(captured, Recording):
                    return captured.results()  # the recording has computed them
        return function(x, *others) if captured is None else captured(x, *others)

    def _capture(self, key: Hashable, function: Function, *tensors: Tensor) -> CudaGraph | Recording | None:
        captured: CudaGraph | Recording | None
        try:
            if not tensors[0].is_cuda:
                captured = Recording(function, *tensors)
            else:
                if self._one_thread and self._memory is None:
                    self._memory = GraphMemory(tensors[0].device)
                captured = CudaGraph(function, *tensors, memory=self._memory)
        except Exception as error:  # a compiler's, CUDA's or torch's; what is really wrong raises again, uncaptured
            reason = (str(error) or type(error).__name__).splitlines()[0]
            warnings.warn(f"nothing was captured, which is slower: {reason}", stacklevel=4)
            captured = None
        self.made[key] = captured
        self._waiting[key] = _CALLS_BEFORE_ANOTHER
        return captured


def _replay_pays(x: Tensor, first_activation: int | None) -> bool:
    """Whether operations are small enough that their calls matter, and are the extension's or torch's."""
    if x.device.type != "cpu" or first_activation is None or first_activation > _MOST_REPLAYED or is_observed():
        return False
    return set(backend.in_use()) <= {"cpu", "reference"}
