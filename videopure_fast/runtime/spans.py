"""Named spans of a purification, which a profile or a progress bar listens to.

Without a listener a span costs about a microsecond. Listeners belong to the context of their `listening` block: another
thread's purification is not heard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from tqdm.auto import tqdm


@dataclass(eq=False)
class Span:
    """Work between two moments.

    name: "encode", "inversion", "denoising", "flow", "guidance" or "decode"; "evaluation", one call of the UNet; or
        "chain", inversion and denoising together, captured or not.
    tensors: what enters the span and, when it has ended, also what leaves it.
    evaluations: how many calls of the UNet a chain stands for.
    """

    name: str
    tensors: tuple[Tensor, ...]
    evaluations: int = 0

    def leave(self, *tensors: Tensor) -> None:
        """Name the tensors that leave the span."""
        self.tensors += tensors


class Listener(Protocol):
    """Is told when spans start and end; spans lie inside one another or one after another."""

    def started(self, span: Span) -> None: ...

    def ended(self, span: Span) -> None: ...


_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("videopure_fast_listeners", default=())


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell `listener` of all spans within this block of this thread."""
    token = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)


@contextmanager
def unheard() -> Iterator[None]:
    """Tell nobody of spans within this block of this thread."""
    token = _listeners.set(())
    try:
        yield
    finally:
        _listeners.reset(token)


@contextmanager
def span(name: str, *tensors: Tensor, evaluations: int = 0) -> Iterator[Span]:
    """A span around this block; `tensors` enter it. It also ends when the block raises."""
    work = Span(name, tensors, evaluations)
    listeners = _listeners.get()
    for listener in listeners:
        listener.started(work)
    try:
        yield work
    finally:
        for listener in reversed(listeners):
            listener.ended(work)


class EvaluationCounter:
    """Calls `advance(n)` when n more evaluations of the UNet are done: each by itself, or a captured chain's together.

    A capture runs the chain more often than once; evaluations beyond a chain's own number are not counted.
    """

    def __init__(self, advance: Callable[[int], object]) -> None:
        self._advance = advance
        self._left = 0  # evaluations of the current chain that are not counted yet

    def started(self, span: Span) -> None:
        if span.name == "chain":
            self._left = span.evaluations

    def ended(self, span: Span) -> None:
        done = {"evaluation": min(1, self._left), "chain": self._left}.get(span.name, 0)
        if done:
            self._left -= done
            self._advance(done)


@contextmanager
def progress_bar(what: str, evaluations: int, *, enabled: bool) -> Iterator[None]:
    """A bar over the UNet's evaluations within this block."""
    if not enabled:
        yield
        return
    with tqdm(total=evaluations, desc=what, unit="eval") as bar, listening(EvaluationCounter(bar.update)):
        yield
