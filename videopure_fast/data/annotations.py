"""Official annotation files of UCF-101, Kinetics-400 and Something-Something V2.

Annotation files come from third parties: they are read as text of bounded size, and no file name in them may lead out
of the folder of the videos. (Links inside that folder are the user's own, and are followed.)
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from ..config import brief

MAX_ANNOTATIONS = 2**26  # bytes of one file, about twice the largest official one
_SHOWN, _LONGEST = 4, 80  # names in a message, and letters of one


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file of at most MAX_ANNOTATIONS bytes, stripped of blanks; empty lines are left out."""
    # str.splitlines would also split at U+2028, which a file name may contain.
    return [line for line in map(str.strip, re.split(r"\r\n|\n|\r", _text(path))) if line]


def read_json(path: Path, kind: type) -> Any:
    """The content of a JSON file, which must be of this type: list or dict."""
    try:
        content = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON that can be read: {error}") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds a {type(content).__name__}; accepted: a {kind.__name__}")
    return content


def read_kinetics_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file with the columns label, youtube_id, time_start and time_end, and perhaps others."""
    needed = {"label", "youtube_id", "time_start", "time_end"}
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise ValueError(f"{path} is not CSV that can be read: {error}") from error
    if not needed <= set(reader.fieldnames or ()):
        seen = "is empty" if reader.fieldnames is None else f"has the columns {', '.join(reader.fieldnames)}"
        raise ValueError(f"{path} {seen}; accepted: {', '.join(sorted(needed))}, and perhaps others")
    columns = len(reader.fieldnames or ())
    for i, row in enumerate(rows):
        values = sum(row[key] is not None for key in row if key is not None) + len(row.get(None, ()))
        if values > columns or any(row[key] is None for key in needed):
            raise ValueError(
                f"{path}: row {i + 1} has more or fewer values than the header, {values}; accepted: {columns}"
            )
    return rows


def read_ucf101_classes(path: Path) -> dict[str, int]:
    """The label of each class name, from lines such as "1 ApplyEyeMakeup"; labels are the numbers minus 1."""
    numbered = []
    for line in read_lines(path):
        match = re.fullmatch(r"([0-9]{1,9})\s+(.+)", line)
        if match is None:
            raise ValueError(f"{path} must have lines of a number and a class, as 1 Archery, got {line!r}")
        numbered.append((match[2], int(match[1]) - 1))
    return _check_numbered(numbered, path, first=1)


def read_something_classes(path: Path) -> dict[str, int]:
    """The label of each template, from a dict such as {"Approaching something with your camera": "0"}."""
    entries = read_json(path, dict)
    for name, number in entries.items():
        if not isinstance(number, str) or not re.fullmatch("[0-9]{1,9}", number):
            seen = f"{name!r} has {brief(number, _LONGEST)}, of type {type(number).__name__}"
            raise ValueError(f'{path} must give each template a number as a text, as "0"; {seen}')
    return _check_numbered([(name, int(number)) for name, number in entries.items()], path, first=0)


def read_texts(entry: Any, keys: Sequence[str], what: str) -> list[str]:
    """The texts of an entry of a JSON file under these keys; ValueError, which begins with `what`, without them."""
    accepted = f"{what} must have the texts {' and '.join(keys)}"
    if not isinstance(entry, dict):
        raise ValueError(f"{accepted}, got {brief(entry, _LONGEST)}, of type {type(entry).__name__}")
    for key in keys:
        if key not in entry:
            raise ValueError(f"{accepted}, got {some(list(map(str, entry))) or 'nothing'}")
        if not isinstance(entry[key], str):
            raise ValueError(
                f"{accepted}, got {key} {brief(entry[key], _LONGEST)}, of type {type(entry[key]).__name__}"
            )
    return [entry[key] for key in keys]


def some(names: Iterable[str], near: str | None = None) -> str:
    """A few of many names, for a message, with their number. near: a name like which the first ones should be."""
    names = list(names)
    first = names if near is None else [*difflib.get_close_matches(near, names, _SHOWN), *names]
    shown = list(dict.fromkeys(first))[:_SHOWN]
    left = len(names) - len(shown)
    return ", ".join(brief(name, _LONGEST) for name in shown) + (f", and {left} more" if left > 0 else "")


def path_inside(root: Path, name: str, source: Path) -> Path:
    """The path of a file name from an annotation file, below root.

    ValueError, which names source, if on any operating system the name could lead out of root.
    """
    foreign = PureWindowsPath(name)  # it takes both / and \ for separators
    if foreign.anchor or ".." in foreign.parts or not foreign.parts or "\0" in name:
        raise ValueError(f"{source}: {name!r} leads out of {root}; accepted: relative paths without ..")
    if "\\" in name:
        raise ValueError(f"{source}: {name!r} has a backslash; accepted: paths with /")
    return root / name


def unique_samples(samples: Iterable[tuple[Path, int]], source: Path) -> list[tuple[Path, int]]:
    """Samples without repeated videos, which would count twice in an accuracy; a UserWarning tells how many there were.

    ValueError if a video has two labels, or if there are no samples.
    """
    labels: dict[Path, int] = {}
    lines = 0
    for lines, (path, label) in enumerate(samples, 1):  # noqa: B007
        if labels.setdefault(path, label) != label:
            raise ValueError(f"{source} gives {path} two labels, {labels[path]} and {label}; accepted: one")
    if not labels:
        raise ValueError(f"{source} lists no videos; accepted: one or more")
    if lines > len(labels):
        warnings.warn(f"{source} repeats {lines - len(labels)} of its videos; each counts once", stacklevel=3)
    return list(labels.items())


def _text(path: Path) -> str:
    """The text of a UTF-8 file of at most MAX_ANNOTATIONS bytes; FileNotFoundError or ValueError otherwise."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with path.open("rb") as file:
        content = file.read(MAX_ANNOTATIONS + 1)
    if len(content) > MAX_ANNOTATIONS:
        raise ValueError(f"{path} is too large; accepted: annotations of {MAX_ANNOTATIONS} bytes at most")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def _check_numbered(pairs: list[tuple[str, int]], path: Path, first: int) -> dict[str, int]:
    """Names to labels, in the order of labels; ValueError unless these are 0, 1, 2, ... and no name repeats.

    first: the number that label 0 has in the file.
    """
    pairs = sorted(pairs, key=lambda pair: pair[1])
    accepted = f"{path} must number its classes without gaps, and each once"
    for place, (name, label) in enumerate(pairs):
        if label != place:
            raise ValueError(f"{accepted}; {name!r} has {label + first} where {place + first} is expected")
    for name, count in Counter(name for name, _ in pairs).items():
        if count > 1:
            raise ValueError(f"{accepted}; {name!r} is there {count} times")
    return dict(pairs)
