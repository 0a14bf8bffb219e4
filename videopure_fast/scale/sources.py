"""Which files are purified: those of a folder, of a list, or of a data set's annotations."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from ..data.annotations import path_inside, read_lines
from ..data.folders import VIDEO_ENDS
from .rows import Job, printable

if TYPE_CHECKING:
    from ..data.datasets import VideoDataset

STATE_FOLDER = ".videopure-fast"  # in the folder of outputs: locks, and what is being written


def folder_jobs(folder: Path, suffix: str) -> list[Job]:
    """The videos in a folder and in all folders below it, sorted; hidden ones are left out. suffix: of the outputs.

    OSError for a folder that cannot be listed.
    """
    jobs = _jobs(folder, sorted(_videos_below(folder)), suffix)
    if not jobs:
        raise ValueError(f"{folder} has no videos; accepted: files in {', '.join(VIDEO_ENDS)}")
    return jobs


def listed_jobs(listing: Path, folder: Path, suffix: str) -> list[Job]:
    """The videos that a text file lists, a path a line, below `folder` or absolute ones that are in it."""
    if listing.name.lower().endswith(VIDEO_ENDS):
        raise ValueError(f"{listing} is one video: use `videopure-fast purify`; accepted: a folder, or a list of paths")
    root = PurePosixPath(os.path.abspath(folder))
    names = []
    for line in read_lines(listing):
        path = PurePosixPath(line)
        if path.is_absolute() and path.is_relative_to(root):
            line = str(path.relative_to(root))
        names.append(path_inside(folder, line, listing).relative_to(folder).as_posix())
    if not names:
        raise ValueError(f"{listing} lists no videos; accepted: a path a line")
    return _jobs(folder, dict.fromkeys(names), suffix)


def dataset_jobs(dataset: VideoDataset, folder: Path, suffix: str) -> list[Job]:
    """The videos of a data set of official annotations; they are below `folder`."""
    return _jobs(folder, (path.relative_to(folder).as_posix() for path, _ in dataset.samples), suffix)


def output_name(name: str, suffix: str) -> str:
    """The name of an output: that of its video, with another extension."""
    end = next((end for end in VIDEO_ENDS if name.lower().endswith(end)), "")
    return name[: len(name) - len(end)] + suffix


def check_apart(folder: Path, out: Path) -> None:
    """ValueError if one of two folders is in the other: the next run would take outputs for sources."""
    read, written = (Path(os.path.realpath(path)) for path in (folder, out))
    if read.is_relative_to(written) or written.is_relative_to(read):
        raise ValueError(f"the videos in {folder} and the outputs in {out} must be in folders apart")


def check_no_replacement(jobs: Iterable[Job], out: Path) -> None:
    """ValueError if an output would replace one of the videos."""
    sources = {os.path.realpath(job.source): job.name for job in jobs}
    for job in jobs:
        if name := sources.get(os.path.realpath(out / job.output)):
            raise ValueError(f"the output of {job.name} would replace {name}: name another folder than {out}")


def _videos_below(folder: Path) -> Iterator[str]:
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # links may lead in a circle
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(inner for inner in folders if not inner.startswith("."))
        below = os.path.relpath(place, folder)
        for file in files:
            if not file.startswith(".") and file.lower().endswith(VIDEO_ENDS):
                yield Path(below, file).as_posix()


def _refuse(error: OSError) -> None:
    """In place of leaving a folder out, as `os.walk` does by itself."""
    raise OSError(f"cannot list the folder {error.filename}: {error.strerror}") from error


def _jobs(folder: Path, names: Iterable[str], suffix: str) -> list[Job]:
    """ValueError if two videos would become one output."""
    root = os.path.abspath(folder)
    jobs: dict[str, Job] = {}
    for name in names:
        shown = printable(name)
        if PurePosixPath(name).parts[0] == STATE_FOLDER:
            raise ValueError(f"{name} is in a folder {STATE_FOLDER}, whose name is taken; accepted: any other")
        job = Job(shown, os.path.join(root, name), output_name(shown, suffix))
        if other := jobs.get(job.output):
            raise ValueError(f"{other.name} and {name} would both become {job.output}: rename one of them")
        jobs[job.output] = job
    return list(jobs.values())
