"""Clips of UCF-101, Kinetics-400 and Something-Something V2, from their official annotations and your video files."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..inputs import check_count, check_generator, check_number
from .annotations import (
    path_inside,
    read_json,
    read_kinetics_rows,
    read_lines,
    read_something_classes,
    read_ucf101_classes,
    unique_samples,
)
from .video import probe, read_frames, working_size

_PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class ClipSampling:
    """Which frames and pixels of a video become a clip (3, frames, crop, crop).

    Attributes:
        frames: number of frames in a clip. A video that is too short repeats its last frame.
        stride: distance between frames of a clip, in frames of the video.
        resize: length of the shorter side after resizing, in pixels, even, 16 or more; the aspect is kept
            (`video.working_size`).
        crop: side of the square that is cut from the center, in pixels, at most `resize`.
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
        """Indices of a clip's frames in a video of `total` frames. place in [0, 1): 0 is the earliest start, 0.5 the
        center."""
        check_count("total", total)
        check_number("place", place)
        if place >= 1:
            raise ValueError(f"place must be less than 1, got {place}")
        starts = max(1, total - (self.frames - 1) * self.stride)
        return [min(int(place * starts) + i * self.stride, total - 1) for i in range(self.frames)]


_SAMPLING = ClipSampling()


class Sample(NamedTuple):
    """A video file and its label, an index into `VideoDataset.classes`."""

    path: Path
    label: int


class Batch(NamedTuple):
    """clips: (B, 3, F, H, W), float32 in [0, 1]; labels: (B,) int64; indices: (B,) int64, into VideoDataset.samples."""

    clips: Tensor
    labels: Tensor
    indices: Tensor


class VideoDataset(Dataset[tuple[Tensor, int]]):
    """Labeled videos: item i is the center clip (3, frames, crop, crop), float32 in [0, 1], and its label, an int.

    Attributes:
        samples: path and label of each video, in the order of the annotations. Files are opened when they are read.
        classes: name of each label.
        sampling: which frames and pixels become a clip.
        skipped: path of each file that `load` could not read, and the reason.

    An item raises FileNotFoundError or ValueError for a file that `video.probe` refuses; `load` skips such files.
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

        split: "train" or "test"; fold: 1, 2 or 3. Labels are the numbers in classInd.txt minus 1.
        """
        if split not in ("train", "test") or fold not in (1, 2, 3):
            raise ValueError(f"got split {split!r} and fold {fold!r}; accepted: train or test, and 1, 2 or 3")
        videos, source = _folder(videos), Path(splits) / f"{split}list{fold:02d}.txt"
        labels = read_ucf101_classes(Path(splits) / "classInd.txt")

        def parse() -> Iterator[tuple[Path, int]]:
            for line in read_lines(source):
                name, stated = line, None
                if len(parts := line.rsplit(None, 1)) == 2 and re.fullmatch("[0-9]{1,9}", parts[1]):
                    name, stated = parts
                path, label = path_inside(videos, name, source), labels.get(name.split("/")[0])
                if label is None:
                    raise ValueError(f"{source}: {name} is in no class of classInd.txt")
                if stated is not None and int(stated) != label + 1:
                    raise ValueError(f"{source}: {name} has label {stated}, its class {label + 1}")
                yield path, label

        return cls(unique_samples(parse(), source), list(labels), sampling=sampling)

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

        Files are `<youtube_id>_<start:06d>_<end:06d>.mp4`, in a folder named like their class, with blanks or with
        underscores, or in `videos` itself if there is no such folder.

        split: None, or the split whose rows are kept.
        classes: the name of each label; None is the names in the file, in alphabetical order. They must be given if the
            file lacks some classes of the model.
        """
        videos, source = _folder(videos), Path(annotations)
        rows = [row for row in read_kinetics_rows(source) if split is None or row.get("split") == split]
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
                    named = [path_inside(videos, spelling, source) for spelling in (name, name.replace(" ", "_"))]
                    folders[name] = next(filter(os.path.isdir, named), videos)
                times = row["time_start"], row["time_end"]
                if not all(re.fullmatch("[0-9]{1,6}", time) for time in times):
                    raise ValueError(f"{source}: {row['youtube_id']} is from {times[0]!r} to {times[1]!r} seconds")
                file = f"{row['youtube_id']}_{int(times[0]):06d}_{int(times[1]):06d}.mp4"
                yield path_inside(folders[name], file, source), labels[name]

        return cls(unique_samples(parse(), source), classes, sampling=sampling)

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
        numbers = read_something_classes(Path(labels))

        def parse() -> Iterator[tuple[Path, int]]:
            for i, entry in enumerate(read_json(source, list)):
                name, template = (entry.get(key) if isinstance(entry, dict) else None for key in ("id", "template"))
                if not (isinstance(name, str) and isinstance(template, str)):
                    raise ValueError(f"{source}: entry {i} must have the texts id and template")
                template = re.sub(r"[\[\]]", "", template)
                if template not in numbers:
                    raise ValueError(f"{source}: {name} has the template {template!r}, which is not in {labels}")
                yield path_inside(videos, f"{name}.webm", source), numbers[template]

        return cls(unique_samples(parse(), source), sorted(numbers, key=numbers.__getitem__), sampling=sampling)

    @property
    def digest(self) -> str:
        """Hash (16 hex digits) of classes, sampling, labels, and the files' paths and sizes: equal for equal data."""
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
        """Read one clip of a video: (3, frames, crop, crop) uint8. place: as in `ClipSampling.indices`."""
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
    """Yield batches of a data set in order, decoded in `workers` processes; 0 is the caller's process.

    A file that cannot be read is skipped: a UserWarning gives path and reason, `dataset.skipped` keeps them, and its
    batch is smaller. Every video is in a batch or in `skipped`.

    indices: indices of the samples to load, in this order; None is all.
    generator: source of random start frames, equal for any number of workers; None starts each clip so that it lies in
        the center of its video.
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
    """The source of clips of an evaluation: (seed, start, count) -> clips (count, 3, F, H, W) and labels (count,).

    The videos are shuffled once; seed s has the videos from s * clips to (s + 1) * clips of that order, so that no two
    seeds share a video. Videos that cannot be read are left out, as in `load`. ValueError for a draw beyond a seed's
    clips or the last video.
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


class _Jobs(Dataset[tuple[int, Tensor | str]]):
    """Items (index of a sample, its clip as uint8 or the reason why it cannot be read).

    Clips stay uint8 here because worker processes send them; floats would be four times as large.
    """

    def __init__(self, dataset: VideoDataset, jobs: list[tuple[int, float]]) -> None:
        self.dataset, self.jobs = dataset, jobs

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, job: int) -> tuple[int, Tensor | str]:
        index, place = self.jobs[job]
        try:
            return index, self.dataset.read(index, place)
        except (OSError, ValueError, RuntimeError) as error:  # torchcodec's are RuntimeErrors
            return index, str(error).strip().partition("\n")[0]


def _batches(dataset: VideoDataset, loader: Iterable[list[tuple[int, Tensor | str]]]) -> Iterator[Batch]:
    """Batches of the clips that could be read; the others are warned of and go to dataset.skipped."""
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
    """The path of a folder; FileNotFoundError if there is none."""
    if not Path(path).is_dir():
        raise FileNotFoundError(f"there is no folder {path}")
    return Path(path)
