"""Annotations of the outputs, in the files from which `data.datasets.VideoDataset` reads a data set of that kind."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from ..data.datasets import VideoDataset
from ..files import atomic_write
from .rows import Job, Row

_Labeled = Sequence[tuple[str, int]]  # names of outputs, and their labels


def write_annotations(kind: str, dataset: VideoDataset, jobs: Sequence[Job], rows: Iterable[Row], out: Path) -> None:
    """Write the annotations of the outputs that are done into their folder, in the data set's order.

    kind: names a method of `VideoDataset`, which reads them: for UCF-101 from `out`, which holds testlist01.txt and
    classInd.txt; for Kinetics from annotations.csv, with the lines of classes.txt for classes; for Something-Something
    V2 from annotations.json and labels.json.
    jobs: those of the data set's samples, in their order. Nothing is written where no output is done.
    """
    done = {row.name for row in rows if row.state == "done"}
    pairs = zip(jobs, dataset.samples, strict=True)
    labeled = [(job.output, sample.label) for job, sample in pairs if job.name in done]
    if not labeled:
        return
    for name, text in _WRITERS[kind](labeled, dataset.classes).items():
        with atomic_write(out / name) as partial:
            partial.write_text(text, encoding="utf-8", newline="")


def _ucf101(labeled: _Labeled, classes: Sequence[str]) -> Mapping[str, str]:
    numbered = (f"{label + 1} {name}\n" for label, name in enumerate(classes))
    return {"classInd.txt": "".join(numbered), "testlist01.txt": "".join(f"{output}\n" for output, _ in labeled)}


def _kinetics400(labeled: _Labeled, classes: Sequence[str]) -> Mapping[str, str]:
    """Files are named <youtube_id>_<start>_<end>; the class names keep their labels where some classes have no rows."""
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["label", "youtube_id", "time_start", "time_end"])
    for output, label in labeled:
        video, start, end = PurePosixPath(output).stem.rsplit("_", 2)
        writer.writerow([classes[label], video, int(start), int(end)])
    return {"annotations.csv": table.getvalue(), "classes.txt": "".join(f"{name}\n" for name in classes)}


def _something_something_v2(labeled: _Labeled, classes: Sequence[str]) -> Mapping[str, str]:
    entries = [{"id": PurePosixPath(output).stem, "template": classes[label]} for output, label in labeled]
    numbers = {name: str(label) for label, name in enumerate(classes)}
    return {"annotations.json": json.dumps(entries), "labels.json": json.dumps(numbers)}


_WRITERS: dict[str, Callable[[_Labeled, Sequence[str]], Mapping[str, str]]] = {
    "ucf101": _ucf101,
    "kinetics400": _kinetics400,
    "something-something-v2": _something_something_v2,
}
# How the outputs of a data set must end for its files to be found again.
READ_BACK = {"ucf101": (".mp4", ".webm"), "kinetics400": (".mp4",), "something-something-v2": (".webm",)}
