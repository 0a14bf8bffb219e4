"""Clips of UCF-101, Kinetics-400 and Something-Something V2, from their official annotations and your video files.

Annotation files are data of strangers: they are read as text up to a bound, and no name in them may leave the folder
of the videos. (Links inside that folder are yours, and followed.)
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..inputs import check_count, check_generator, check_number
from .video import probe, read_frames, working_size

MAX_ANNOTATIONS = 2**26  # bytes of one file, about twice the largest official one
_PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class ClipSampling:
    """Which frames and pixels of a video become a clip (3, frames, crop, crop).

    Attributes:
        frames: of a clip. A video that is too short repeats its last frame.
        stride: every stride-th frame is taken.
        resize: pixels of the shorter side, even, 16 or more; the aspect is kept (`video.working_size`).
        crop: side of the square that is cut from the center, at most `resize`.
    """

    frames: int = 32
    stride: int = 2
    resize: int = 256
    crop: int = 224

    def __post_init__(self) -> None:
        for field in fields(self):
            check_count(field.name, getattr(self, field.name))
        working_size(self.resize, self.resize, self.resize)
        if self.crop > self.resize:
            raise ValueError(f"crop {self.crop} is more than resize {self.resize}, the shorter side")

    def indices(self, total: int, place: float = 0.5) -> list[int]:
        """Frames of a clip from a video of `total`; place in [0, 1): 0.5 is the center, 0 the earliest start."""
        check_count("total", total)
        check_number("place", place)
        if place >= 1:
            raise ValueError(f"place must be less than 1, got {place}")
        starts = max(1, total - (self.frames - 1) * self.stride)
        return [min(int(place * starts) + i * self.stride, total - 1) for i in range(self.frames)]


_SAMPLING = ClipSampling()


class Sample(NamedTuple):
    path: Path
    label: int


class Batch(NamedTuple):
    """clips (B, 3, F, H, W), floats in [0, 1]; labels (B,) int64; indices (B,) int64 into `VideoDataset.samples`."""

    clips: Tensor
    labels: Tensor
    indices: Tensor


class VideoDataset(Dataset):
    """Labeled videos: item i is the center clip (3, frames, crop, crop), floats in [0, 1], and its label, an int.

    Attributes:
        samples: path and label of each video, in the order of the annotations. Files are opened when they are read.
        classes: names by label.
        sampling: which frames and pixels become a clip.
        skipped: of the files that `load` could not read, path and reason.

    An item raises FileNotFoundError or ValueError for a file that `video.probe` refuses; `load` goes on without it.
    """

    def __init__(
        self,
        samples: Sequence[tuple[Path, int]],
        classes: Sequence[str],
        *,
        sampling: ClipSampling = _SAMPLING,
    ) -> None:
        if not isinstance(sampling, ClipSampling):
            raise TypeError(f"sampling must be a ClipSampling, got {type(sampling).__name__}")
        self.samples = [Sample(Path(path), label) for path, label in samples]
        self.classes = tuple(classes)
        if len(set(self.classes)) != len(self.classes) or not all(self.classes):
            raise ValueError("classes must be names, none blank and none twice")
        self.sampling = sampling
        self.skipped: dict[Path, str] = {}
        if not self.samples:
            raise ValueError("there are no videos in the list")
        for path, label in self.samples:
            if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(self.classes):
                raise ValueError(f"{path} has label {label!r}; accepted: 0 to {len(self.classes) - 1}")

    @classmethod
    def ucf101(
        cls,
        videos: _PathLike,
        splits: _PathLike,
        *,
        split: str = "test",
        fold: int = 1,
        sampling: ClipSampling = _SAMPLING,
    ) -> VideoDataset:
        """UCF-101: `videos` holds a folder for each class, `splits` classInd.txt, trainlist01.txt, testlist01.txt, ...

        split: "train" or "test"; fold: 1, 2 or 3. Labels are classInd.txt's less one.
        """
        if split not in ("train", "test") or fold not in (1, 2, 3):
            raise ValueError(f"got split {split!r} and fold {fold!r}; accepted: train or test, and 1, 2 or 3")
        videos, source = _folder(videos), Path(splits) / f"{split}list{fold:02d}.txt"
        labels = _ucf101_classes(Path(splits) / "classInd.txt")

        def parse() -> Iterator[tuple[Path, int]]:
            for line in read_lines(source):
                name, stated = line, None
                if len(parts := line.rsplit(None, 1)) == 2 and re.fullmatch("[0-9]{1,9}", parts[1]):
                    name, stated = parts
                path, label = _inside(videos, name, source), labels.get(name.split("/")[0])
                if label is None:
                    raise ValueError(f"{source}: {name} is in no class of classInd.txt")
                if stated is not None and int(stated) != label + 1:
                    raise ValueError(f"{source}: {name} has label {stated}, its class {label + 1}")
                yield path, label

        return cls(_unique(parse(), source), list(labels), sampling=sampling)

    @classmethod
    def kinetics400(
        cls,
        videos: _PathLike,
        annotations: _PathLike,
        *,
        split: str | None = None,
        classes: Sequence[str] | None = None,
        sampling: ClipSampling = _SAMPLING,
    ) -> VideoDataset:
        """Kinetics: `annotations` is a CSV file with label, youtube_id, time_start, time_end and, perhaps, split.

        Files are `<youtube_id>_<start:06d>_<end:06d>.mp4`, in the folder of their class, its blanks kept or
        underscores, or where there is none in `videos` itself. `split` keeps the rows of one. `classes` are the names
        by label, by default those of the file in alphabetical order: give them where the file has not all of a
        model's.
        """
        videos, source = _folder(videos), Path(annotations)
        rows = [row for row in _csv_rows(source) if split is None or row.get("split") == split]
        if not rows:
            raise ValueError(f"{source} has no rows" + ("" if split is None else f" of split {split!r}"))
        classes = sorted({row["label"] for row in rows}) if classes is None else list(classes)
        labels = {name: label for label, name in enumerate(classes)}
        folders: dict[str, Path] = {}

        def parse() -> Iterator[tuple[Path, int]]:
            for row in rows:
                name = row["label"]
                if name not in labels:
                    raise ValueError(f"{source}: label {name!r} is none of the {len(labels)} classes")
                if name not in folders:
                    named = [_inside(videos, spelling, source) for spelling in (name, name.replace(" ", "_"))]
                    folders[name] = next(filter(os.path.isdir, named), videos)
                times = row["time_start"], row["time_end"]
                if not all(re.fullmatch("[0-9]{1,6}", time) for time in times):
                    raise ValueError(f"{source}: {row['youtube_id']} is from {times[0]!r} to {times[1]!r} seconds")
                file = f"{row['youtube_id']}_{int(times[0]):06d}_{int(times[1]):06d}.mp4"
                yield _inside(folders[name], file, source), labels[name]

        return cls(_unique(parse(), source), classes, sampling=sampling)

    @classmethod
    def something_something_v2(
        cls,
        videos: _PathLike,
        annotations: _PathLike,
        labels: _PathLike,
        *,
        sampling: ClipSampling = _SAMPLING,
    ) -> VideoDataset:
        """Something-Something V2: `annotations` is a split's JSON file, `labels` is labels.json, files `<id>.webm`."""
        videos, source = _folder(videos), Path(annotations)
        numbers = _something_classes(Path(labels))

        def parse() -> Iterator[tuple[Path, int]]:
            for i, entry in enumerate(_json(source, list)):
                values = [entry.get(key) if isinstance(entry, dict) else None for key in ("id", "template")]
                if not all(isinstance(value, str) for value in values):
                    raise ValueError(f"{source}: entry {i} must have the texts id and template")
                name, template = values[0], re.sub(r"[\[\]]", "", values[1])
                if template not in numbers:
                    raise ValueError(f"{source}: {name} has the template {template!r}, which is not in {labels}")
                yield _inside(videos, f"{name}.webm", source), numbers[template]

        return cls(_unique(parse(), source), sorted(numbers, key=numbers.__getitem__), sampling=sampling)

    @property
    def digest(self) -> str:
        """Of classes, labels, and the files' paths and sizes: equal for equal data."""
        found = hashlib.sha256(repr((self.classes, self.sampling)).encode())
        for path, label in self.samples:
            size = path.stat().st_size if path.is_file() else -1
            found.update(repr((str(path), label, size)).encode())
        return found.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.read(index).float() / 255, self.samples[index].label

    def read(self, index: int, place: float = 0.5) -> Tensor:
        """A clip of one video, (3, frames, crop, crop) uint8; `place` as for `ClipSampling.indices`."""
        video = probe(self.samples[index].path)
        wanted, crop = self.sampling.indices(video.frames, place), self.sampling.crop
        kept: dict[int, Tensor] = {}
        for i, frame in enumerate(itertools.islice(read_frames(video, self.sampling.resize), wanted[-1] + 1)):
            if i in wanted:
                top, left = ((side - crop) // 2 for side in frame.shape[1:])
                kept[i] = frame[:, top : top + crop, left : left + crop].clone()
        return torch.stack([kept[i] for i in wanted], 1)


def load(
    dataset: VideoDataset,
    batch_size: int,
    workers: int = 0,
    *,
    indices: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Batch]:
    """Batches of a data set, decoded in `workers` processes, in order; 0 is the caller's own.

    A file that cannot be read is skipped: a UserWarning tells path and reason, `dataset.skipped` keeps them, and its
    batch is smaller. Every video is in a batch or in `skipped`.

    indices: of the samples to load, in this order; None is all.
    generator: start each clip at random, the same for any number of workers; None is the center.
    """
    if not isinstance(dataset, VideoDataset):
        raise TypeError(f"dataset must be a VideoDataset, got {type(dataset).__name__}")
    check_count("batch_size", batch_size)
    check_count("workers", workers, least=0)
    indices = range(len(dataset)) if indices is None else list(indices)
    if indices and not 0 <= min(indices) <= max(indices) < len(dataset):
        raise ValueError(f"indices are {min(indices)} to {max(indices)}; accepted: 0 to {len(dataset) - 1}")
    places = [0.5] * len(indices)
    if generator is not None:
        check_generator(generator)
        places = torch.rand(len(indices), generator=generator, dtype=torch.float64).tolist()
    jobs = _Jobs(dataset, list(zip(indices, places, strict=True)))
    return _batches(dataset, DataLoader(jobs, batch_size=batch_size, num_workers=workers, collate_fn=list))


def draws(dataset: VideoDataset, clips: int, workers: int = 0) -> Callable[[int, int, int], tuple[Tensor, Tensor]]:
    """What `evaluation.evaluate` draws from: (seed, start, count) -> clips (count, 3, F, H, W) and labels (count,).

    The videos stand in one random order, of which each seed has the next `clips`: no video is of two seeds. Those that
    cannot be read are missing, as for `load`. ValueError for a draw beyond a seed's clips, or the last video.
    """
    check_count("clips", clips)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()

    def draw(seed: int, start: int, count: int) -> tuple[Tensor, Tensor]:
        for name, value, least in (("seed", seed, 0), ("start", start, 0), ("count", count, 1)):
            check_count(name, value, least=least)
        if start + count > clips:
            raise ValueError(f"a seed has {clips} clips, but those from {start} to {start + count} were asked for")
        first = seed * clips + start
        if first + count > len(order):
            raise ValueError(f"{clips} clips for each seed from 0 to {seed} are more than the {len(order)} videos")
        for batch in load(dataset, count, workers, indices=order[first : first + count]):
            return batch.clips, batch.labels
        side = dataset.sampling.crop
        return torch.empty(0, 3, dataset.sampling.frames, side, side), torch.empty(0, dtype=torch.int64)

    return draw


class _Jobs(Dataset):
    """(index, its clip as uint8, or why there is none). Bytes travel between processes; the floats are made after."""

    def __init__(self, dataset: VideoDataset, jobs: list[tuple[int, float]]) -> None:
        self.dataset, self.jobs = dataset, jobs

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, job: int) -> tuple[int, Tensor | str]:
        index, place = self.jobs[job]
        try:
            return index, self.dataset.read(index, place)
        except (OSError, ValueError) as error:
            return index, str(error)


def _batches(dataset: VideoDataset, loader: Iterable[list[tuple[int, Tensor | str]]]) -> Iterator[Batch]:
    for results in loader:
        read = [(index, clip) for index, clip in results if isinstance(clip, Tensor)]
        for index, reason in results:
            if isinstance(reason, str):
                path = dataset.samples[index].path
                dataset.skipped[path] = reason
                warnings.warn(f"skipped {path}: {reason}", stacklevel=2)
        if read:
            clips = torch.stack([clip for _, clip in read]).float() / 255
            indices = [index for index, _ in read]
            labels = [dataset.samples[index].label for index in indices]
            yield Batch(clips, torch.tensor(labels), torch.tensor(indices))


def _folder(path: _PathLike) -> Path:
    if not Path(path).is_dir():
        raise FileNotFoundError(f"there is no folder {path}")
    return Path(path)


def _text(path: Path) -> str:
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


def read_lines(path: Path) -> list[str]:
    """Of a text file of bounded size, in UTF-8: its lines without blanks around them, empty ones left out."""
    # Not splitlines: a name may hold U+2028.
    return [line for line in map(str.strip, re.split(r"\r\n|\n|\r", _text(path))) if line]


def _json(path: Path, kind: type) -> Any:
    try:
        content = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON that can be read: {error}") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds a {type(content).__name__}; accepted: a {kind.__name__}")
    return content


def _csv_rows(path: Path) -> list[dict[str, str]]:
    needed = {"label", "youtube_id", "time_start", "time_end"}
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise ValueError(f"{path} is not CSV that can be read: {error}") from error
    if not needed <= set(reader.fieldnames or ()):
        raise ValueError(f"{path} has the columns {reader.fieldnames}; accepted: {', '.join(sorted(needed))}")
    for i, row in enumerate(rows):
        if None in row or any(row[key] is None for key in needed):
            raise ValueError(f"{path}: row {i + 1} has more or fewer values than the header")
    return rows


def _ucf101_classes(path: Path) -> dict[str, int]:
    """Labels by name, from lines "1 ApplyEyeMakeup"."""
    matches = [re.fullmatch(r"([0-9]{1,9})\s+(.+)", line) for line in read_lines(path)]
    if not all(matches):
        raise ValueError(f"{path} must have lines of a number and a class")
    return _numbered([(match[2], int(match[1]) - 1) for match in matches], path)


def _something_classes(path: Path) -> dict[str, int]:
    """Labels by template, from {"Approaching something with your camera": "0"}."""
    entries = _json(path, dict)
    if not all(isinstance(number, str) and re.fullmatch("[0-9]{1,9}", number) for number in entries.values()):
        raise ValueError(f"{path} must give each template a number as a text")
    return _numbered([(name, int(number)) for name, number in entries.items()], path)


def _numbered(pairs: list[tuple[str, int]], path: Path) -> dict[str, int]:
    pairs = sorted(pairs, key=lambda pair: pair[1])
    if [label for _, label in pairs] != list(range(len(pairs))) or len(dict(pairs)) != len(pairs):
        raise ValueError(f"{path} must number its classes without gaps, and each once")
    return dict(pairs)


def _inside(root: Path, name: str, source: Path) -> Path:
    """The path of a name from an annotation file; ValueError if it could lead out of the root on any system."""
    foreign = PureWindowsPath(name)  # which takes both / and \ for a separator
    if foreign.anchor or ".." in foreign.parts or not foreign.parts or "\0" in name:
        raise ValueError(f"{source}: {name!r} leads out of {root}; accepted: relative paths without ..")
    return root / name


def _unique(samples: Iterable[tuple[Path, int]], source: Path) -> list[tuple[Path, int]]:
    """Each video once: a repeated one would count twice in an accuracy. ValueError if its labels differ."""
    labels: dict[Path, int] = {}
    lines = 0
    for lines, (path, label) in enumerate(samples, 1):  # noqa: B007
        if labels.setdefault(path, label) != label:
            raise ValueError(f"{source} gives {path} two labels, {labels[path]} and {label}")
    if not labels:
        raise ValueError(f"{source} lists no videos")
    if lines > len(labels):
        warnings.warn(f"{source} repeats {lines - len(labels)} of its videos; each counts once", stacklevel=3)
    return list(labels.items())
