"""Clips of UCF-101, Kinetics-400 and Something-Something V2, from their official annotations and your video files."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..inputs import as_floats, check_count, check_generator
from .annotations import (
    path_inside,
    read_json,
    read_kinetics_rows,
    read_lines,
    read_something_classes,
    read_texts,
    read_ucf101_classes,
    some,
    unique_samples,
)
from .folders import class_folders, videos_below
from .sources import SAMPLING, ClipSampling, ClipSource, WrongLabelError, read_clip

__all__ = ["Batch", "ClipSampling", "Sample", "VideoDataset", "check_class_names", "draws", "load"]

_PathLike = str | os.PathLike[str]


class Sample(NamedTuple):
    """A video file and its label, an index into `VideoDataset.classes`."""

    path: Path
    label: int


class Batch(NamedTuple):
    """clips: (B, 3, F, H, W), float32 in [0, 1]; labels: (B,) int64; indices: (B,) int64, into VideoDataset.samples."""

    clips: Tensor
    labels: Tensor
    indices: Tensor


class VideoDataset(ClipSource):
    """Labeled videos: item i is the center clip (3, frames, crop, crop), float32 in [0, 1], and its label, an int.

    Attributes:
        samples: path and label of each video, in the order of the annotations. Files are opened when they are read.
        classes: name of each label.
        sampling: which frames and pixels become a clip.
        skipped: path of each file that `load` could not read, and the reason.

    `VideoDataset.folder` reads class folders, the others official annotations; `mapped.MappedDataset` takes a data set
    of torch or Hugging Face.

    An item raises FileNotFoundError or ValueError for a file that `video.probe` refuses; `load` skips such files.
    """

    def __init__(
        self,
        samples: Sequence[tuple[Path, int]],
        classes: Sequence[str],
        *,
        sampling: ClipSampling = SAMPLING,
    ) -> None:
        if not isinstance(sampling, ClipSampling):
            raise TypeError(f"sampling must be a ClipSampling, got {type(sampling).__name__}")
        self.samples = [Sample(Path(path), label) for path, label in samples]
        self.classes: tuple[str, ...] = check_class_names(classes)
        self.sampling = sampling
        self.skipped = {}
        if not self.samples:
            raise ValueError("there are no videos in the list")
        for path, label in self.samples:
            if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(self.classes):
                raise ValueError(f"{path} has label {label!r}; accepted: 0 to {len(self.classes) - 1}")

    @classmethod
    def folder(
        cls, videos: _PathLike, *, classes: Sequence[str] | None = None, sampling: ClipSampling = SAMPLING
    ) -> VideoDataset:
        """Class folders: `videos` holds a folder for each class, with its videos or folders of them.

        Classes are the folders in alphabetical order, as in torchvision's ImageFolder, and files those whose names end
        as videos do. Hidden files and folders are left out; a UserWarning names other files that are.

        classes: the name of each label, of which the folders may be some; None: the folders' names.
        """
        root = _folder(videos)
        folders = class_folders(root)
        classes = folders if classes is None else check_class_names(classes)
        labels = {name: label for label, name in enumerate(classes)}
        if unknown := [name for name in folders if name not in labels]:
            raise ValueError(
                f"{root} has a folder {unknown[0]!r}, which is no class; accepted: {some(classes, unknown[0])}"
            )
        samples = ((path, labels[name]) for name in folders for path in videos_below(root, name))
        return cls(unique_samples(samples, root), classes, sampling=sampling)

    @classmethod
    def ucf101(
        cls,
        videos: _PathLike,
        splits: _PathLike,
        *,
        split: str = "test",
        fold: int = 1,
        sampling: ClipSampling = SAMPLING,
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
                path, (home, slash, _) = path_inside(videos, name, source), name.partition("/")
                if not slash:
                    raise ValueError(f"{source}: {name!r} is in no class's folder; accepted: <class>/<file>, with /")
                if home not in labels:
                    known = some(labels, home)
                    raise ValueError(f"{source}: {name} is in no class of classInd.txt; accepted: {known}")
                label = labels[home]
                if stated is not None and int(stated) != label + 1:
                    seen = f"{name} has label {stated}, its class {label + 1}"
                    raise ValueError(f"{source}: {seen}; accepted: the number of its class in classInd.txt")
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
        sampling: ClipSampling = SAMPLING,
    ) -> VideoDataset:
        """Kinetics: `annotations` is a CSV file with label, youtube_id, time_start, time_end and, perhaps, split.

        Files are `<youtube_id>_<start:06d>_<end:06d>.mp4`, in a folder named like their class, with blanks or with
        underscores, or in `videos` itself if there is no such folder.

        split: None, or the split whose rows are kept.
        classes: the name of each label; None is the names in the file, in alphabetical order. They must be given if the
            file lacks some classes of the model.
        """
        videos, source = _folder(videos), Path(annotations)
        every = read_kinetics_rows(source)
        rows = [row for row in every if split is None or row.get("split") == split]
        if not rows:
            splits = sorted({row["split"] for row in every if row.get("split")})
            known = f"; accepted: {some(splits) or 'None, since no row states a split'}" if every else ""
            of_split = "" if split is None else f" of split {split!r}"
            raise ValueError(f"{source} has no rows{of_split}{known}")
        classes = sorted({row["label"] for row in rows}) if classes is None else check_class_names(classes)
        labels = {name: label for label, name in enumerate(classes)}
        folders: dict[str, Path] = {}

        def parse() -> Iterator[tuple[Path, int]]:
            for row in rows:
                name = row["label"]
                if name not in labels:
                    seen = f"label {name!r} is none of the {len(labels)} classes"
                    raise ValueError(f"{source}: {seen}; accepted: {some(labels, name)}")
                if name not in folders:
                    named = [path_inside(videos, spelling, source) for spelling in (name, name.replace(" ", "_"))]
                    folders[name] = next(filter(os.path.isdir, named), videos)
                times = row["time_start"], row["time_end"]
                if not all(re.fullmatch("[0-9]{1,6}", time) for time in times):
                    seen = f"{row['youtube_id']!r} is from {times[0]!r} to {times[1]!r} seconds"
                    raise ValueError(f"{source}: {seen}; accepted: whole seconds, as 10 and 20, of 6 digits at most")
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
        sampling: ClipSampling = SAMPLING,
    ) -> VideoDataset:
        """Something-Something V2: `annotations` is a split's JSON file, `labels` is labels.json, files `<id>.webm`."""
        videos, source = _folder(videos), Path(annotations)
        numbers = read_something_classes(Path(labels))

        def parse() -> Iterator[tuple[Path, int]]:
            for i, entry in enumerate(read_json(source, list)):
                name, template = read_texts(entry, ("id", "template"), f"{source}: entry {i}")
                template = re.sub(r"[\[\]]", "", template)
                if template not in numbers:
                    seen = f"{name} has the template {template!r}, which is not in {labels}"
                    raise ValueError(f"{source}: {seen}; accepted: {some(numbers, template)}")
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

    def read(self, index: int, place: float = 0.5) -> Tensor:
        """Read one clip of a video: (3, frames, crop, crop) uint8. place: as in `ClipSampling.indices`."""
        return read_clip(self.samples[index].path, self.sampling, place)

    def read_labeled(self, index: int, place: float = 0.5) -> tuple[Tensor, int]:
        return self.read(index, place), self.samples[index].label

    def name(self, index: int) -> Path:
        return self.samples[index].path


def check_class_names(classes: Sequence[str]) -> tuple[str, ...]:
    """Names of classes as a tuple; TypeError or ValueError unless they are texts, none blank and none twice."""
    names = tuple(classes)
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise TypeError(f"classes must be names, got {wrong[0]!r}; accepted: a text for each label")
    if wrong := [name for name, count in Counter(names).items() if count > 1 or not name.strip()]:
        raise ValueError(f"classes must be names, none blank and none twice, got {wrong[0]!r}")
    return names


def load(
    dataset: ClipSource,
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
    if not isinstance(dataset, ClipSource):
        accepted = "accepted: a VideoDataset, or a MappedDataset for another data set"
        raise TypeError(f"dataset must be a VideoDataset, got {type(dataset).__name__}; {accepted}")
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


def draws(dataset: ClipSource, clips: int, workers: int = 0) -> Callable[[int, int, int], tuple[Tensor, Tensor]]:
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
        return torch.empty(0, *dataset.clip_shape), torch.empty(0, dtype=torch.int64)

    return draw


_Read = tuple[int, tuple[Tensor, int] | str]  # an item's index, and its clip and label or the reason why it has none


class _Jobs(Dataset[_Read]):
    """Items that are read, or the reason why not.

    Clips of files stay uint8 here because worker processes send them; floats would be four times as large.
    """

    def __init__(self, dataset: ClipSource, jobs: list[tuple[int, float]]) -> None:
        self.dataset, self.jobs = dataset, jobs

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, job: int) -> _Read:
        index, place = self.jobs[job]
        try:
            return index, self.dataset.read_labeled(index, place)
        except WrongLabelError:
            raise
        except (OSError, ValueError, RuntimeError) as error:  # torchcodec's are RuntimeErrors
            return index, str(error).strip().partition("\n")[0]


def _batches(dataset: ClipSource, loader: Iterable[list[_Read]]) -> Iterator[Batch]:
    """Batches of the clips that could be read; the others are warned of and go to dataset.skipped."""
    for results in loader:
        read = [(index, *found) for index, found in results if not isinstance(found, str)]
        for index, reason in results:
            if isinstance(reason, str):
                name = dataset.name(index)
                dataset.skipped[name] = reason
                warnings.warn(f"skipped {name}: {reason}", stacklevel=2)
        if read:
            indices, clips, labels = zip(*read, strict=True)
            yield Batch(as_floats(torch.stack(clips)), torch.tensor(labels), torch.tensor(indices))


def _folder(path: _PathLike) -> Path:
    """The path of a folder; FileNotFoundError if there is none."""
    if not Path(path).is_dir():
        raise FileNotFoundError(f"there is no folder {path}")
    return Path(path)
