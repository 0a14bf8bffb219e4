"""Which of a kernel's candidates a launch takes: the fastest one measured on such a GPU, or else the reasoned one.

A launcher that has a choice names it:

    tile = choose("linear_residual", (nearby(rows), columns, inputs, kind), candidates, reasoned)

op         the op, or the part of it that is chosen for
key        whatever the best candidate depends on, numbers and words
candidates all that compute this call: tiles (tuples of numbers), or a word for another way, such as "library"
reasoned   the one of them to take where nothing was measured

`make gpu-tune` times the candidates of every call of a purification, and writes the fastest of each key to tuned.json:
by architecture, with the GPU they were measured on. An entry that is no candidate any more is passed over.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from .launch import architecture

TABLE = Path(__file__).resolve().with_name("tuned.json")

Key = tuple[int | str, ...]
Candidate = TypeVar("Candidate", bound="tuple[Any, ...] | str")


class Choice(NamedTuple):
    """A choice that a launch had; see the top of this file."""

    op: str
    key: Key
    candidates: tuple[Any, ...]
    reasoned: Any


_forced: ContextVar[tuple[str, Key, Any] | None] = ContextVar("videopure_fast_forced_candidate", default=None)
_recorded: ContextVar[list[Choice] | None] = ContextVar("videopure_fast_recorded_choices", default=None)


def choose(op: str, key: Key, candidates: Sequence[Candidate], reasoned: Candidate) -> Candidate:
    """The candidate that this launch takes."""
    if (found := _recorded.get()) is not None:
        found.append(Choice(op, key, tuple(candidates), reasoned))
    if (override := _forced.get()) is not None and override[:2] == (op, key):
        chosen: Candidate = override[2]
        return chosen
    fastest = _measured(architecture()).get((op, *key))
    return next((candidate for candidate in candidates if as_json(candidate) == fastest), reasoned)


def nearby(count: int) -> int:
    """`count` rounded up to a power of two, for a key: calls of about one size share a choice."""
    return 1 << (count - 1).bit_length()


def as_json(candidate: tuple[Any, ...] | str) -> list[Any] | str:
    """A candidate as tuned.json has it."""
    return candidate if isinstance(candidate, str) else list(candidate)


@contextmanager
def forced(op: str, key: Key, candidate: Any) -> Iterator[None]:
    """Within this block of this thread, launches that have this choice take the candidate."""
    token = _forced.set((op, key, candidate))
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def recorded() -> Iterator[list[Choice]]:
    """The choices that launches within this block of this thread have, in order."""
    found: list[Choice] = []
    token = _recorded.set(found)
    try:
        yield found
    finally:
        _recorded.reset(token)


@cache
def _measured(architecture: int) -> dict[tuple[Any, ...], Any]:
    """(op, *key) -> the fastest candidate as JSON, on GPUs of this architecture; empty where nothing was measured."""
    table = read(TABLE) if TABLE.exists() else {}
    return {(op, *key): candidate for op, key, candidate in table.get(str(architecture), {}).get("choices", ())}


def reload() -> None:
    """Read tuned.json anew at the next choice."""
    _measured.cache_clear()


def read(path: Path) -> dict[str, Any]:
    """A table: {architecture: {"gpu": its name, "choices": [[op, key, candidate], ...]}}. ValueError for another."""
    try:
        table: dict[str, Any] = json.loads(path.read_text())
        for name, found in table.items():
            entries = [_is_key(key) and isinstance(best, list | str) for _, key, best in found["choices"]]
            if not (name.isdecimal() and isinstance(found["gpu"], str) and all(entries)):
                raise TypeError("an entry of another kind")
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no table of choices ({error}); `make gpu-tune` writes one") from error
    return table


def _is_key(key: Any) -> bool:
    return isinstance(key, list) and all(isinstance(part, int | str) for part in key)
