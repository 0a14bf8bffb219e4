"""Sources of labeled clips: what data sets of files and data sets of others have in common."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..inputs import as_floats, check_count, check_number
from .video import probe, read_frames, working_size


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


SAMPLING = ClipSampling()


class WrongLabelError(ValueError):
    """A label that is none of the classes: not one item is wrong, but the data set or its classes are."""


class ClipSource(Dataset[tuple[Tensor, int]], ABC):
    """Labeled clips by index: item i is a clip (3, F, H, W), float32 in [0, 1], and its label, an int.

    Attributes:
        classes: name of each label; None where they are not known.
        sampling: which frames and pixels of a video become a clip.
        skipped: name of each item that `datasets.load` could not read, and the reason.
    """

    classes: tuple[str, ...] | None
    sampling: ClipSampling
    skipped: dict[Path | str, str]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read_labeled(self, index: int, place: float = 0.5) -> tuple[Tensor, int]:
        """A clip, uint8 or float32 in [0, 1], and its label. place: as in `ClipSampling.indices`.

        OSError, ValueError or RuntimeError for an item that cannot be read, which `load` skips. WrongLabelError, which
        ends it.
        """

    @abstractmethod
    def name(self, index: int) -> Path | str:
        """What an item is called in messages: the path of its file, if it has one."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """Hash (16 hex digits): equal for equal data."""

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """(3, F, H, W), that of all clips."""
        return 3, self.sampling.frames, self.sampling.crop, self.sampling.crop

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        clip, label = self.read_labeled(index)
        return as_floats(clip), label


def read_clip(path: Path, sampling: ClipSampling, place: float = 0.5) -> Tensor:
    """One clip of a video file: (3, frames, crop, crop) uint8. place: as in `ClipSampling.indices`.

    FileNotFoundError or ValueError for a file that `video.probe` refuses.
    """
    video = probe(path)
    wanted = sampling.indices(video.frames, place)
    return cut_clip(read_frames(video, sampling.resize), wanted, sampling.crop)


def cut_clip(frames: Iterable[Tensor], wanted: list[int], crop: int) -> Tensor:
    """The wanted ones of a video's frames (3, H, W), in order, cut to their center: (3, F, crop, crop)."""
    kept: dict[int, Tensor] = {}
    for i, frame in enumerate(itertools.islice(frames, wanted[-1] + 1)):
        if i in wanted:
            top, left = ((side - crop) // 2 for side in frame.shape[1:])
            kept[i] = frame[:, top : top + crop, left : left + crop].clone()
    return torch.stack([kept[i] for i in wanted], 1)
