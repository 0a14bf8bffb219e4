"""The distinct calls of a purification, recorded while it runs, and inputs to make each of them again.

Recorded are the operators of videopure_fast and torch's convolutions, matrix products and attention: the function, how
its tensors lie in memory, its other arguments, how often each stage calls it; and of its tensors either the values or,
where there are many, their mean and standard deviation.
"""

from __future__ import annotations

import math
from collections import Counter
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from videopure_fast import Purifier
from videopure_fast.ops.backend import NAMESPACE
from videopure_fast.ops.linear_moments import row_moments
from videopure_fast.runtime.spans import Span, listening

LIBRARY_CALLS = ("conv2d", "conv_transpose2d", "linear", "matmul", "bmm", "scaled_dot_product_attention")
MOST_KEPT = 2**20  # values of a tensor that are kept as they were; of a larger one, random values are as good


Inputs = tuple[list[Any], dict[str, Any]]  # arguments and keyword arguments


class Operand(NamedTuple):
    """How a tensor lies in memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def extent(self) -> int:
        """Values from the first to the last in memory."""
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))

    def __str__(self) -> str:
        dense = torch.empty(self.shape, device="meta").stride() == self.stride
        return "x".join(map(str, self.shape)) + ("" if dense else f" by {','.join(map(str, self.stride))}")


class Signature(NamedTuple):
    """All that decides the speed of a call. operands: arguments, then `keywords`' values, tensors as Operands."""

    op: str
    operands: tuple[Any, ...]
    keywords: tuple[str, ...]

    def __str__(self) -> str:
        count = len(self.operands) - len(self.keywords)
        named = zip(self.keywords, self.operands[count:], strict=True)
        given = [*map(str, self.operands[:count]), *(f"{name}={value}" for name, value in named)]
        dtypes = dict.fromkeys(str(o.dtype).removeprefix("torch.") for o in self.operands if isinstance(o, Operand))
        return f"{self.op}({', '.join(given)}) {'/'.join(dtypes)}"


class Values(NamedTuple):
    """A tensor's values, from the first to the last in memory, or else their mean and standard deviation."""

    kept: Tensor | None
    mean: float = 0.0
    deviation: float = 0.0


class Call:
    """A call that was recorded. counts: how often, by stage."""

    def __init__(self, signature: Signature, function: Any, values: list[Values | None]) -> None:
        self.signature, self.function, self._values = signature, function, values
        self.is_op = is_op(function)
        self.counts: Counter[str] = Counter()

    @cached_property
    def size(self) -> int:
        """Bytes of all tensors that it is given."""
        operands = (operand for operand in self.signature.operands if isinstance(operand, Operand))
        return sum(math.prod(operand.shape) * operand.dtype.itemsize for operand in operands)

    def inputs(self, device: torch.device, *, wide: bool = False) -> Inputs:
        """Inputs like those recorded, with the same values each time. wide: in float32."""
        torch.manual_seed(0)
        made = [
            made_like(operand, values, device, wide) if values is not None else operand
            for operand, values in zip(self.signature.operands, self._values, strict=True)
        ]
        if self.signature.op.startswith("folded_") and device.type != "meta":  # they describe x and the weight
            made[1], made[3] = row_moments(made[0]), made[2].double().sum(1).float()
        count = len(made) - len(self.signature.keywords)
        return made[:count], dict(zip(self.signature.keywords, made[count:], strict=True))


def is_op(function: Any) -> bool:
    """Whether it is an operator of videopure_fast that has a result."""
    return getattr(function, "namespace", None) == NAMESPACE and not function._schema.is_mutable


def _folds(arguments: tuple[Any, ...]) -> bool:
    """Whether a call is one of those that fold weights once, in float64: no call of a purification."""
    return isinstance(arguments[0], Tensor) and arguments[0].dtype == torch.float64


def made_like(operand: Operand, values: Values, device: torch.device, wide: bool) -> Tensor:
    if device.type == "meta":
        flat = torch.empty(operand.extent, dtype=operand.dtype, device=device)
    elif values.kept is None:
        flat = torch.empty(operand.extent, dtype=operand.dtype, device=device).normal_(values.mean, values.deviation)
    else:
        flat = values.kept.to(device, copy=True)
    flat = flat.float() if wide and flat.is_floating_point() else flat
    return flat.as_strided(operand.shape, operand.stride)


def values_of(tensor: Tensor, operand: Operand) -> Values:
    if operand.extent <= MOST_KEPT:
        return Values(tensor.as_strided((operand.extent,), (1,)).clone())
    deviation, mean = torch.std_mean(tensor.float())
    return Values(None, mean.item(), deviation.item())


class Recorder(TorchFunctionMode):
    """Records calls within its block; `listening` to spans tells it the stages."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Signature, Call] = {}
        self._stages: list[str] = []

    def started(self, span: Span) -> None:
        self._stages.append(span.name)

    def ended(self, span: Span) -> None:
        self._stages.pop()

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        keywords = keywords or {}
        library = getattr(function, "__name__", "") in LIBRARY_CALLS and not _folds(arguments)
        if is_op(function) or library:
            self._record(function, [*arguments, *keywords.values()], tuple(keywords))
        return function(*arguments, **keywords)

    def _record(self, function: Any, given: list[Any], keywords: tuple[str, ...]) -> None:
        operands = tuple(
            Operand(tuple(value.shape), value.stride(), value.dtype)
            if isinstance(value, Tensor)
            else (tuple(value) if isinstance(value, list) else value)
            for value in given
        )
        signature = Signature(function._opname if is_op(function) else function.__name__, operands, keywords)
        if signature not in self.calls:
            pairs = zip(given, operands, strict=True)
            values = [values_of(value, operand) if isinstance(value, Tensor) else None for value, operand in pairs]
            self.calls[signature] = Call(signature, function, values)
        self.calls[signature].counts[self._stages[0] if self._stages else "other"] += 1


@torch.no_grad()
def recorded_calls(purifier: Purifier, clips: Tensor) -> list[Call]:
    """The distinct calls of one purification, those that move the most bytes first."""
    recorder = Recorder()
    with recorder, listening(recorder):
        purifier(clips, return_votes=True, capture=False)
    return sorted(recorder.calls.values(), key=lambda call: -call.size * call.counts.total())
