"""What a call reads back from the device, once, when its results are there.

Stages leave on the device whether their results are finite, and the look at the models whether a weight may have
changed. Nothing waits for either before the end. Each thread's call has its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor


class Readback:
    """Flags on any device, each with what it means when it is true."""

    def __init__(self) -> None:
        self._flags: list[tuple[Tensor, str]] = []  # and a sentence; no sentence for a change of the weights

    def add(self, flag: Tensor, meaning: str = "") -> None:
        self._flags.append((flag, meaning))

    def extend(self, other: Readback) -> None:
        """Take over the flags of another one as well."""
        self._flags += other._flags

    def read(self) -> bool:
        """Whether the models were as they had been. FloatingPointError if they were, and a result is not finite."""
        found: dict[str, bool] = {}
        by_device: dict[torch.device, list[tuple[Tensor, str]]] = defaultdict(list)
        for flag, meaning in self._flags:
            by_device[flag.device].append((flag, meaning))
        for flags in by_device.values():
            values = torch.stack([flag for flag, _ in flags]).tolist()
            found |= {meaning: True for (_, meaning), value in zip(flags, values, strict=True) if value}
        if "" in found:
            return False
        for _, meaning in self._flags:
            if meaning in found:
                raise FloatingPointError(meaning)
        return True


_current: ContextVar[Readback | None] = ContextVar("videopure_fast_readback", default=None)


@contextmanager
def collecting() -> Iterator[Readback]:
    """The flags that this block of this thread leaves."""
    flags = Readback()
    token = _current.set(flags)
    try:
        yield flags
    finally:
        _current.reset(token)


def flag_change(*flags: Tensor) -> None:
    """Flags of which one is true if the models are not what they are taken for."""
    if (current := _current.get()) is not None:
        for flag in flags:
            current.add(flag)


def check_finite(stage: str, *results: Tensor, dtype: torch.dtype) -> None:
    """Results that leave a stage must be finite. dtype: in which it has computed."""
    current = _current.get()
    for result in results:
        if current is not None and not result.is_meta:
            extremes = torch.stack(torch.aminmax(result.detach()))
            current.add(~extremes.isfinite().all(), _overflow(stage, dtype))


def _overflow(stage: str, dtype: torch.dtype) -> str:
    seen = f"the stage {stage!r} made values that are not finite in {str(dtype).removeprefix('torch.')}"
    if dtype in (torch.float32, torch.float64):
        return f"{seen}: the models' weights, the flow or the settings are far beyond what they should be"
    wider = "float32" if dtype == torch.bfloat16 else "bfloat16 or float32"
    return f"{seen}: its range does not suffice for this model; load it with dtype {wider}"
