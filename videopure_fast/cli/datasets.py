"""The data sets of the command `evaluate`: their names, their options, and how they are made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ..data.datasets import VideoDataset

DatasetName = Literal["tiny", "folder", "ucf101", "kinetics400", "something-something-v2"]

# The options that each data set needs. All but the packaged clips accept those of sampling too.
_NEEDED: dict[DatasetName, tuple[str, ...]] = {
    "tiny": (),
    "folder": ("videos",),
    "ucf101": ("videos", "annotations"),
    "kinetics400": ("videos", "annotations"),
    "something-something-v2": ("videos", "annotations", "labels"),
}
# Frames and pixels of the clips on which the packaged classifier was trained.
_TINY_SAMPLING = {"frames": 16, "stride": 1, "resize": 32, "crop": 32}


def check_options(dataset: DatasetName, options: dict[str, Any]) -> None:
    """ValueError where a data set lacks an option, or would ignore one."""
    needed, given = _NEEDED[dataset], [name for name, value in options.items() if value is not None]
    if missing := [f"--{name}" for name in needed if name not in given]:
        raise ValueError(f"--dataset {dataset} needs {' and '.join(missing)}")
    accepted = needed if dataset == "tiny" else (*needed, "frames", "stride", "resize", "crop")
    accepted += ("classes",) if dataset in ("folder", "kinetics400") else ()
    if ignored := [f"--{name}" for name in given if name not in accepted]:
        raise ValueError(f"--dataset {dataset} takes no {' or '.join(ignored)}")


def build_dataset(
    name: DatasetName, files: dict[str, Path | None], sampling: dict[str, int | None], classifier: str
) -> VideoDataset:
    """The data set of that name. files, sampling: options by name, None where they are not given."""
    from ..data.annotations import read_lines
    from ..data.datasets import ClipSampling, VideoDataset

    usual = _TINY_SAMPLING if classifier == "tiny" else {}
    chosen = ClipSampling(**usual | {option: value for option, value in sampling.items() if value is not None})
    classes = None if files["classes"] is None else read_lines(files["classes"])
    places = [path for option in _NEEDED[name] if (path := files[option]) is not None]
    if name == "ucf101":
        videos, splits = places
        return VideoDataset.ucf101(videos, splits, sampling=chosen)
    if name == "something-something-v2":
        videos, annotations, labels = places
        return VideoDataset.something_something_v2(videos, annotations, labels, sampling=chosen)
    if name == "folder":
        return VideoDataset.folder(places[0], classes=classes, sampling=chosen)
    videos, annotations = places
    return VideoDataset.kinetics400(videos, annotations, classes=classes, sampling=chosen)
