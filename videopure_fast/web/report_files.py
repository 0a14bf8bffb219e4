"""Files of results, read within bounds, and values in them that know where they stand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MOST_BYTES = 2**26  # of a file
_MOST_CHARACTERS = 300  # of a text that is shown
_MOST = 1e15  # of a number


class Value:
    """A part of a results file. What is taken from it is checked: a ValueError says where it is and what is accepted.

    found: what JSON holds there. file: the file's name. path: the way to it, such as "rows[3].median".
    """

    def __init__(self, found: Any, file: str, path: str = "") -> None:
        self.found, self.file, self.path = found, file, path

    def __getitem__(self, key: str) -> Value:
        found = self.get(key)
        if found is None:
            raise ValueError(f"{self._where()} has no {key!r}")
        return found

    def get(self, key: str) -> Value | None:
        """The value of a key; None where there is none, or null."""
        found = self._checked(dict, "an object").get(key)
        return None if found is None else self._part(found, f".{key}")

    def __iter__(self) -> Iterator[Value]:
        """The values of an array."""
        return (self._part(one, f"[{place}]") for place, one in enumerate(self._checked(list, "an array")))

    def items(self) -> Iterator[tuple[str, Value]]:
        """The keys, as they may be shown, and the values of an object."""
        found = self._checked(dict, "an object").items()
        return ((printable(key), self._part(value, f".{key}")) for key, value in found)

    def number(self) -> float:
        """A finite number of 0 or more."""
        found = self.found
        if isinstance(found, bool) or not isinstance(found, (int, float)) or not 0 <= found <= _MOST:
            raise self._refusal("a number of 0 or more")
        return float(found)

    def count(self) -> int:
        """A whole number of 0 or more."""
        if self.number() != int(self.found):
            raise self._refusal("a whole number")
        return int(self.found)

    def counts(self, length: int) -> list[int]:
        """An array of so many whole numbers."""
        found = [one.count() for one in self]
        if len(found) != length:
            raise self._refusal(f"{length} whole numbers")
        return found

    def flag(self) -> bool:
        return bool(self._checked(bool, "true or false"))

    def text(self) -> str:
        """A text as it may be shown."""
        return printable(self._checked(str, "a text"))

    def shown(self) -> str:
        """A text or a number, in words that may be shown."""
        return self.text() if isinstance(self.found, str) else f"{self.number():.15g}"

    def _checked(self, kind: type, words: str) -> Any:
        if not isinstance(self.found, kind):
            raise self._refusal(words)
        return self.found

    def _part(self, found: Any, step: str) -> Value:
        return Value(found, self.file, f"{self.path}{step}".lstrip("."))

    def _where(self) -> str:
        return printable(f"{self.file}: {self.path}" if self.path else self.file)

    def _refusal(self, accepted: str) -> ValueError:
        return ValueError(f"{self._where()} is {printable(repr(self.found))[:60]}; accepted: {accepted}")


def printable(text: str) -> str:
    """The first characters of a text, with a mark for each that cannot be printed, such as controls and surrogates."""
    return "".join(one if one.isprintable() else "\ufffd" for one in text[:_MOST_CHARACTERS])


def read(path: Path) -> Value | None:
    """The value of a JSON file; None where there is no file. ValueError for one that is too large or no JSON."""
    if not path.exists():
        return None
    try:
        if not path.is_file():
            raise ValueError("it is no regular file")
        if (size := path.stat().st_size) > _MOST_BYTES:
            raise ValueError(f"it has {size} bytes; accepted: {_MOST_BYTES} or less")
        return Value(json.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read results from {path}: {error}") from error
