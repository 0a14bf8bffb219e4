"""Folders of videos by class: <root>/<class>/<video>."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from .annotations import some

# `video` reads files whose names end so.
VIDEO_ENDS = (".avi", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mts", ".ts", ".webm")
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


def class_folders(root: Path) -> list[str]:
    """The names of the class folders in a folder, sorted; ValueError if there are none."""
    inside = [entry for entry in sorted(root.iterdir()) if not _hidden(entry.name)]
    found = [entry.name for entry in inside if entry.is_dir()]
    stray = [entry.name for entry in inside if _is_video(entry.name) and not entry.is_dir()]
    if not found:
        seen = some(stray) or "no folder"
        raise ValueError(f"{root} has {seen}; accepted: a folder for each class, as {root}/archery/clip.mp4")
    if {name.lower() for name in found} <= _SPLITS and not any(
        _is_video(inner.name) for name in found for inner in (root / name).iterdir()
    ):
        raise ValueError(
            f"{root} has the splits {some(found)}, not classes; accepted: one of them, as {root / found[0]}"
        )
    if stray:
        warnings.warn(f"{root}: {some(stray)} left out, since they are in no class's folder", stacklevel=3)
    return found


def videos_below(root: Path, name: str) -> Iterator[Path]:
    """The videos of a class folder and of folders in it, sorted; ValueError if there are none."""
    videos: list[Path] = []
    others: list[str] = []
    seen: set[str] = set()
    for folder, folders, files in os.walk(root / name, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else sorted(inner for inner in folders if not _hidden(inner))
        for file in files if real not in seen else ():
            if _is_video(file):
                videos.append(Path(folder, file))
            elif not _hidden(file):
                others.append(file)
        seen.add(real)  # links may lead in a circle
    ends = ", ".join(VIDEO_ENDS)
    if not videos:
        held = some(others) or "nothing"
        raise ValueError(f"{root / name} is a class without videos, it has {held}; accepted: files in {ends}")
    if others:
        warnings.warn(f"{root / name}: {some(sorted(others))} left out; accepted: files in {ends}", stacklevel=4)
    yield from sorted(videos)


def _is_video(name: str) -> bool:
    return not _hidden(name) and name.lower().endswith(VIDEO_ENDS)


def _hidden(name: str) -> bool:
    return name.startswith(".")
