"""Map-style data sets of others as they are: lists, torch's and torchvision's, Hugging Face's with a Video column."""

from __future__ import annotations

import hashlib
import operator
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..inputs import as_floats, check_video
from .annotations import some
from .datasets import check_class_names
from .sources import SAMPLING, ClipSampling, ClipSource, WrongLabelError, cut_clip, read_clip
from .video import working_size

_ACCEPTED = 'accepted: items (video, label), or with the keys "video" and "label"'
_TRIED = 8  # items that are read before a data set is refused, and data sets that may be inside each other
_VIDEOS = "accepted: tensors (3, F, H, W), paths of video files, their bytes, and torchcodec's decoders"


class _Columns(NamedTuple):
    """The keys of an item's video and label."""

    video: str
    label: str


_USUAL = _Columns("video", "label")


class MappedDataset(ClipSource):
    """The labeled videos of a map-style data set: of anything with a length whose items have a video and a label.

    Items are (video, label), also with something between them as torchvision's (video, audio, label), or mappings with
    the keys "video" and "label"; of a Hugging Face data set, its Video column and its ClassLabel column, whatever they
    are called. A video is a tensor or an array (3, F, H, W), floats in [0, 1] or uint8, which is the clip as it is, all
    of one shape; or a file's path, its bytes, Hugging Face's dict of both, or torchcodec's decoder, of which `sampling`
    says what becomes a clip. A label is an integer, or a text among the classes.

    Args:
        dataset: the data set. Its items must be the same at each reading, so without random transforms.
        classes: name of each label; None: those of a ClassLabel, the data set's own `classes` or, of a Hugging Face
            column of texts, its texts in alphabetical order.
        sampling: which frames and pixels of an encoded video become a clip.

    TypeError or ValueError for other data sets, as the first item shows. Items that cannot be read raise OSError,
    ValueError or RuntimeError, and `datasets.load` skips them.
    """

    def __init__(
        self, dataset: Any, *, classes: Sequence[str] | None = None, sampling: ClipSampling = SAMPLING
    ) -> None:
        if not is_map_style(dataset):
            seen = f"a {type(dataset).__name__}"
            if isinstance(dataset, Mapping):
                seen += f" with the keys {some(map(str, dataset))}: pass one of its values, such as a split"
            raise TypeError(f"the data set is {seen}; accepted: one with a length and items by number")
        if not isinstance(sampling, ClipSampling):
            raise TypeError(f"sampling must be a ClipSampling, got {type(sampling).__name__}")
        if not len(dataset):
            raise ValueError("the data set is empty; accepted: one or more items")
        features = next((found for one in _inside(dataset) if isinstance(found := _features(one), Mapping)), {})
        self._columns = _columns(features)
        self._given, self._dataset = dataset, _undecoded(dataset, self._columns.video)
        classes = _classes(dataset, features, self._columns.label) if classes is None else classes
        self.classes = None if classes is None else check_class_names(classes)
        self._labels = {name: label for label, name in enumerate(self.classes or ())}
        self.sampling = sampling
        self.skipped = {}
        self._shape: tuple[int, ...] | None = None
        self._shape = tuple(self._first_clip().shape)

    def __len__(self) -> int:
        return len(self._dataset)

    def read_labeled(self, index: int, place: float = 0.5) -> tuple[Tensor, int]:
        video, label = self._parts(index)
        found = self._label(index, label)
        clip = self._clip(index, video, place)
        if self._shape is not None and tuple(clip.shape) != self._shape:
            raise ValueError(f"the clip is {tuple(clip.shape)}; accepted: {self._shape}, the shape of item 0")
        return clip, found

    def name(self, index: int) -> str:
        return f"item {index}"

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        _, frames, height, width = self._shape or super().clip_shape
        return 3, frames, height, width

    @property
    def digest(self) -> str:
        """Hash (16 hex digits) of classes, sampling, length, and the data set's fingerprint or, where it has none, the
        first, middle and last clip with their labels."""
        found = hashlib.sha256(repr((self.classes, self.sampling, len(self))).encode())
        fingerprint = getattr(self._given, "_fingerprint", None)
        if isinstance(fingerprint, str):
            found.update(fingerprint.encode())
        else:
            for index in sorted({0, len(self) // 2, len(self) - 1}):
                try:
                    clip, label = self.read_labeled(index)
                except (OSError, ValueError, RuntimeError):
                    found.update(b"unreadable")
                else:
                    found.update(repr(label).encode() + as_floats(clip).cpu().numpy().tobytes())
        return found.hexdigest()[:16]

    def _first_clip(self) -> Tensor:
        """The clip of the first item that can be read, which must be among the first few; its errors say why not."""
        reason: tuple[int, Exception] | None = None
        for index in range(min(len(self), _TRIED)):
            try:
                clip, _ = self.read_labeled(index)
            except (OSError, ValueError, RuntimeError) as error:
                reason = reason or (index, error)
                continue
            if _is_array(self._parts(index)[0]) and not torch.equal(clip, self.read_labeled(index)[0]):
                raise ValueError(f"item {index} differs from reading to reading; accepted: no random transforms")
            return clip
        assert reason is not None
        index, cause = reason
        # Not of the error's own kind: some, such as UnicodeDecodeError, are not made from a message.
        kind = FileNotFoundError if isinstance(cause, FileNotFoundError) else ValueError
        raise kind(f"item {index}: {cause}") from cause

    def _parts(self, index: int) -> tuple[Any, Any]:
        """An item's video and label. TypeError for items of another form."""
        item = self._dataset[index]
        if isinstance(item, Mapping):
            # A transform may name things anew.
            columns = self._columns if all(key in item for key in self._columns) else _USUAL
            if missing := [key for key in columns if key not in item]:
                raise TypeError(f"item {index} has no {missing[0]!r} but {some(map(str, item))}; {_ACCEPTED}")
            return item[columns.video], item[columns.label]
        if isinstance(item, (tuple, list)) and len(item) in (2, 3):
            return item[0], item[-1]
        raise TypeError(f"item {index} is a {type(item).__name__}; {_ACCEPTED}")

    def _label(self, index: int, label: Any) -> int:
        """A label as an int. TypeError or WrongLabelError for what is no label of the classes, ValueError for one below
        0: -1 is Hugging Face's unknown label."""
        if isinstance(label, str):
            if label not in self._labels:
                known = some(self._labels, label) or "integers, or texts with classes=..."
                raise WrongLabelError(f"item {index} has the label {label!r}; accepted: {known}")
            return self._labels[label]
        try:
            found = operator.index(label)
        except (TypeError, ValueError, RuntimeError):
            found = None
        if found is None or isinstance(label, bool):
            raise TypeError(f"item {index} has a label of type {type(label).__name__}; accepted: an integer or a text")
        if self.classes is not None and found >= len(self.classes):
            raise WrongLabelError(f"item {index} has the label {found}; accepted: 0 to {len(self.classes) - 1}")
        if found < 0:
            raise ValueError(f"the label is {found}, which stands for none")
        return found

    def _clip(self, index: int, video: Any, place: float) -> Tensor:
        """A clip (3, F, H, W), uint8 or float32, from any form of a video."""
        if _is_array(video):
            clip = torch.as_tensor(video)
            check_video(clip)
            if clip.ndim != 4:
                raise ValueError(f"video has shape {tuple(clip.shape)}; accepted: (3, F, H, W), an item for each clip")
            return clip.cpu() if clip.dtype == torch.uint8 else clip.detach().cpu().float()
        path, content = video, None
        if isinstance(video, Mapping):
            path, content = video.get("path"), video.get("bytes")
        elif isinstance(video, (bytes, bytearray)):
            path, content = None, video
        if content is not None:
            return _read_bytes(content, self.sampling, place)
        if isinstance(path, str) and "://" in path and self._given is not self._dataset:
            video = self._given[index][self._columns.video]  # torchcodec's decoder reads from afar
        elif isinstance(path, (str, os.PathLike)):
            return read_clip(Path(path), self.sampling, place)
        if hasattr(video, "get_frames_at") and hasattr(video, "__len__"):
            return _decoded(video, self.sampling, place)
        raise TypeError(f"item {index} has a video of type {type(video).__name__}; {_VIDEOS}")


def _is_array(video: Any) -> bool:
    return isinstance(video, Tensor) or hasattr(video, "__array_interface__")


def is_map_style(dataset: Any) -> bool:
    """Whether it has a length and items by number."""
    if isinstance(dataset, (str, bytes, Mapping)):
        return False
    return hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")


def _inside(dataset: Any) -> Iterator[Any]:
    """A data set and those that it wraps, as torch's Subset does."""
    for _ in range(_TRIED):
        if dataset is None:
            return
        yield dataset
        dataset = getattr(dataset, "dataset", None)


def _features(dataset: Any) -> Any:
    """The columns of a Hugging Face data set by name; None for other data sets."""
    return getattr(dataset, "features", None)


def _columns(features: Mapping[str, Any]) -> _Columns:
    """The column of videos and that of labels: those of these types, or named "video" and "label"."""
    found = []
    for kind, usual in zip(("Video", "ClassLabel"), _USUAL, strict=True):
        named = [name for name in (usual, f"{usual}s") if name in features]
        typed = [name for name, feature in features.items() if type(feature).__name__ == kind]
        if len(typed) > 1 and not set(named) & set(typed):
            raise ValueError(f"the data set has the {kind} columns {some(typed)}; accepted: one, or one named {usual}")
        both = [name for name in typed if name in named] or typed or named
        found.append(both[0] if both else usual)
    return _Columns(*found)


def _undecoded(dataset: Any, column: str) -> Any:
    """A Hugging Face data set that gives files instead of torchcodec's decoders; any other as it is.

    Files are read by `video`, with its checks and without torchcodec. A data set with a transform of its own is left
    alone: that may need the decoders.
    """
    feature: Any = (_features(dataset) or {}).get(column)
    transformed = (getattr(dataset, "format", None) or {}).get("type") == "custom"
    if type(feature).__name__ != "Video" or not feature.decode or transformed:
        return dataset
    return dataset.cast_column(column, type(feature)(decode=False))


def _classes(dataset: Any, features: Mapping[str, Any], label: str) -> Sequence[str] | None:
    """The names of a data set's labels, if it has any."""
    if isinstance(names := getattr(features.get(label), "names", None), (list, tuple)):
        return names
    for one in _inside(dataset):
        if isinstance(names := getattr(one, "classes", None), (list, tuple)):
            return names
        if label in features and features[label].dtype == "string" and hasattr(one, "unique"):
            return sorted(one.unique(label))
    return None


def _read_bytes(content: bytes | bytearray, sampling: ClipSampling, place: float) -> Tensor:
    """A clip (3, frames, crop, crop) uint8 of a video file's bytes. ValueError for what is no video."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "video")
        copy.write_bytes(content)
        try:
            return read_clip(copy, sampling, place)
        except (OSError, ValueError, RuntimeError) as error:  # without a name that is another in each run
            raise ValueError(str(error).replace(str(copy), "the video")) from error


def _decoded(decoder: Any, sampling: ClipSampling, place: float) -> Tensor:
    """A clip (3, frames, crop, crop) uint8 by a torchcodec decoder."""
    wanted = sampling.indices(len(decoder), place)
    different = sorted(set(wanted))
    frames = decoder.get_frames_at(indices=different).data.cpu()
    if frames.shape[1] != 3:
        frames = frames.permute(0, 3, 1, 2)  # a decoder may be set to channels last
    if frames.is_floating_point():
        frames = (frames * 255).round().to(torch.uint8)
    height, width = frames.shape[2:]
    shape = working_size(height, width, sampling.resize)
    if (height, width) != shape:
        frames = F.interpolate(frames.contiguous(), shape, mode="bilinear", antialias=True)
    return cut_clip(frames, [different.index(i) for i in wanted], sampling.crop)
