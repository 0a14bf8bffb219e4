"""Map-style data sets of others."""

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

import av
import numpy as np
import pytest
import torch
from conftest import clips
from test_datasets import SMALL, frames_of, write
from torch.utils.data import Subset, TensorDataset

from videopure_fast.data.datasets import draws, load
from videopure_fast.data.mapped import MappedDataset

CLIPS = clips(3, 3, 4, 16, 16)
PAIRS = [(clip, label) for clip, label in zip(CLIPS, [1, 0, 1], strict=True)]


class Torch:
    """A data set of torch's kind, with the classes that torchvision's have."""

    classes: ClassVar = ["a", "b"]

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return CLIPS[index].mul(255).round().byte(), torch.empty(1, 0), [1, 0, 1][index]


# Hugging Face's Dataset, as far as it is used: columns with features, decoded when an item is read.


@dataclass
class Video:
    decode: bool = True

    def decode_example(self, value):
        return Decoder(value["path"])


@dataclass
class ClassLabel:
    names: list[str]
    dtype: ClassVar[str] = "int64"


@dataclass
class Value:
    dtype: str


class Decoder:
    """torchcodec's VideoDecoder of a video whose frame i is gray of 8 * i."""

    def __init__(self, path, frames=11, last=False):
        self.path, self.frames, self.last = path, frames, last

    def __len__(self):
        return self.frames

    def get_frames_at(self, indices):
        data = torch.tensor(indices, dtype=torch.uint8).mul(8).view(-1, 1, 1, 1).expand(-1, 3, 48, 64)
        return type("FrameBatch", (), {"data": data.permute(0, 2, 3, 1) if self.last else data})()


@dataclass
class HuggingFace:
    columns: dict[str, list[Any]]
    features: dict[str, Any]
    format: dict[str, Any] = field(default_factory=lambda: {"type": None})
    _fingerprint: str = "0a1b"

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index):
        row = {name: values[index] for name, values in self.columns.items()}
        for name, feature in self.features.items():
            if isinstance(feature, Video) and feature.decode:
                row[name] = feature.decode_example(row[name])
        return row

    def cast_column(self, column, feature):
        return HuggingFace(self.columns, self.features | {column: feature}, self.format, "other")

    def unique(self, column):
        return list(dict.fromkeys(self.columns[column]))


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "a.mp4", frames=13)


def huggingface(path, label=1, **changed):
    video = {"path": str(path), "bytes": None} | changed
    features = {"id": Value("string"), "clip": Video(), "action": ClassLabel(["b", "a"])}
    return HuggingFace({"id": ["x"], "clip": [video], "action": [label]}, features)


@pytest.mark.parametrize(
    "dataset",
    [
        PAIRS,
        TensorDataset(CLIPS, torch.tensor([1, 0, 1])),
        [{"video": clip, "label": np.int64(label)} for clip, label in PAIRS],
        [{"label": torch.tensor(label), "video": clip.numpy()} for clip, label in PAIRS],
        tuple(PAIRS),
        [(clip.double(), label) for clip, label in PAIRS],
        Subset([PAIRS[0], (CLIPS[0], 0), *PAIRS[1:]], [0, 2, 3]),
    ],
)
def test_tensors_are_clips(dataset):
    mapped = MappedDataset(dataset)
    batches = list(load(mapped, 2))
    assert [batch.labels.tolist() for batch in batches] == [[1, 0], [1]]
    assert torch.equal(torch.cat([batch.clips for batch in batches]), CLIPS)
    assert batches[0].clips.dtype == torch.float32 and mapped.classes is None and not mapped.skipped
    clip, label = mapped[2]
    assert torch.equal(clip, CLIPS[2]) and (label, type(label)) == (1, int)


def test_torchvisions_items_and_classes():
    mapped = MappedDataset(Torch())
    assert mapped.classes == ("a", "b") and mapped.clip_shape == (3, 4, 16, 16)
    clip, label = mapped[0]
    assert label == 1 and torch.equal(clip, CLIPS[0].mul(255).round() / 255)
    assert MappedDataset(Subset(Torch(), [1])).classes == ("a", "b")
    assert MappedDataset(Torch(), classes=["x", "y"]).classes == ("x", "y")
    assert torch.equal(next(load(mapped, 3, 2)).clips, CLIPS.mul(255).round() / 255)


def test_hugging_faces_videos_are_read_from_their_files(path, monkeypatch):
    def missing(self, value):
        raise ImportError("To support decoding videos, please install 'torchcodec'.")

    monkeypatch.setattr(Video, "decode_example", missing)
    mapped = MappedDataset(huggingface(path), sampling=SMALL)
    clip, label = mapped[0]
    assert mapped.classes == ("b", "a") and label == 1 and clip.shape == (3, 4, 24, 24)
    assert frames_of(clip) == [3, 5, 7, 9]
    assert torch.equal(clip, MappedDataset(huggingface("no.mp4", bytes=path.read_bytes()), sampling=SMALL)[0][0])
    assert torch.equal(clip, MappedDataset([(path, 0)], sampling=SMALL)[0][0])
    assert torch.equal(clip, MappedDataset([(str(path), 0)], sampling=SMALL)[0][0])
    assert torch.equal(clip, MappedDataset([(path.read_bytes(), 0)], sampling=SMALL)[0][0])


@pytest.mark.parametrize("last", [False, True])
def test_decoders_are_asked_for_the_clips_frames(last):
    mapped = MappedDataset([(Decoder("x", 13, last), 0), (Decoder("y", 5, last), 1)], sampling=SMALL)
    assert frames_of(mapped[0][0]) == [3, 5, 7, 9] and mapped[0][0].shape == (3, 4, 24, 24)
    assert frames_of(mapped[1][0]) == [0, 2, 4, 4]  # the last frame is repeated


def test_hugging_faces_videos_from_afar_and_transformed_are_decoded_by_it(path):
    afar = MappedDataset(huggingface("hf://datasets/a/b/c.mp4"), sampling=SMALL)
    assert frames_of(afar[0][0]) == [2, 4, 6, 8]
    transformed = huggingface(path)
    transformed.format = {"type": "custom"}
    assert frames_of(MappedDataset(transformed, sampling=SMALL)[0][0]) == [2, 4, 6, 8]


def test_labels_may_be_texts():
    dataset = [{"video": clip, "label": name} for clip, name in zip(CLIPS, "bab", strict=True)]
    assert [MappedDataset(dataset, classes=["a", "b"])[i][1] for i in range(3)] == [1, 0, 1]
    features = {"video": Value("list"), "label": Value("string")}
    found = MappedDataset(HuggingFace({"video": list(CLIPS), "label": list("bab")}, features))
    assert found.classes == ("a", "b") and [found[i][1] for i in range(3)] == [1, 0, 1]


def test_items_that_cannot_be_read_are_skipped(path, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"x")
    files = [(tmp_path / "broken.mp4", 0), (path, 1), (tmp_path / "none.mp4", 0), (path, -1)]
    mapped = MappedDataset(files, sampling=SMALL)
    with pytest.warns(UserWarning, match="skipped item 0: .*not a video"):
        (batch,) = load(mapped, 4)
    assert batch.labels.tolist() == [1]
    assert list(mapped.skipped) == ["item 0", "item 2", "item 3"]
    assert mapped.skipped["item 3"] == "the label is -1, which stands for none"
    longer = MappedDataset([*PAIRS, (clips(3, 5, 16, 16), 0), (CLIPS[0] * 2, 0)])
    with pytest.warns(UserWarning, match="skipped item 3: the clip is .3, 5, 16, 16.; accepted: .3, 4, 16, 16., the"):
        assert len(next(load(longer, 5)).clips) == 3
    assert "video has values from" in longer.skipped["item 4"]


class Jittered(Torch):
    def __getitem__(self, index):
        return torch.rand(3, 4, 16, 16), 0


class Stream:
    def __iter__(self):
        return iter(PAIRS)


@pytest.mark.parametrize(
    "dataset, error, message",
    [
        ({"train": PAIRS, "test": PAIRS}, TypeError, "a dict with the keys 'train', 'test': pass one of its values"),
        (Stream(), TypeError, "the data set is a Stream; accepted: one with a length and items by number"),
        ("folder", TypeError, "the data set is a str"),
        ([], ValueError, "the data set is empty"),
        ([1, 2, 3], TypeError, 'item 0 is a int; accepted: items (video, label), or with the keys "video" and "label"'),
        ([{"clip": CLIPS[0], "label": 0}], TypeError, "item 0 has no 'video' but 'clip', 'label'; accepted: items"),
        ([(CLIPS[0].transpose(0, 1), 0)], ValueError, "item 0: video has shape (4, 3, 16, 16); accepted: (B, 3, F"),
        ([(CLIPS[0].permute(1, 2, 3, 0), 0)], ValueError, "this looks like (B, F, H, W, 3): pass it with .movedim"),
        ([(CLIPS[0] * 255, 0)], ValueError, "these look like 0..255: divide by 255, or pass uint8"),
        ([(CLIPS[0] * 2 - 1, 0)], ValueError, "these look normalized"),
        ([(CLIPS, 0)], ValueError, "accepted: (3, F, H, W), an item for each clip"),
        ([(CLIPS[0], 0.5)], TypeError, "item 0 has a label of type float; accepted: an integer or a text"),
        ([(CLIPS[0], True)], TypeError, "item 0 has a label of type bool"),
        ([(CLIPS[0], "a")], ValueError, "item 0 has the label 'a'; accepted: integers, or texts with classes=..."),
        ([(None, 0)], TypeError, "item 0 has a video of type NoneType; accepted: tensors (3, F, H, W), paths"),
        ([("nowhere.mp4", 0)], FileNotFoundError, "item 0: there is no file nowhere.mp4"),
        (Jittered(), ValueError, "item 0 differs from reading to reading; accepted: no random transforms"),
    ],
)
def test_other_data_sets_are_refused(dataset, error, message):
    with pytest.raises(error, match=re.escape(message)):
        MappedDataset(dataset)


@pytest.mark.parametrize(
    ("seen", "error"),
    [
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), ValueError),
        (av.InvalidDataError(1, "Invalid data", "a.mp4"), ValueError),
        (av.FileNotFoundError(2, "No such file", "a.mp4"), FileNotFoundError),
        (PermissionError(13, "Permission denied", "a.mp4"), ValueError),
        (RuntimeError("no decoder"), ValueError),
    ],
)
def test_errors_of_every_kind_say_which_item(seen, error):
    class Raising(Torch):
        def __getitem__(self, index):
            raise seen

    with pytest.raises(error, match=re.escape(f"item 0: {seen}")) as caught:
        MappedDataset(Raising())
    assert type(caught.value) is error and caught.value.__cause__ is seen


def test_labels_beyond_the_classes_end_the_loading():
    mapped = MappedDataset([*PAIRS, (CLIPS[0], 2)], classes=["a", "b"])
    with pytest.raises(ValueError, match="item 3 has the label 2; accepted: 0 to 1"):
        list(load(mapped, 2))
    with pytest.raises(ValueError, match="item 0 has the label 'c'; accepted: 'a', 'b'"):
        MappedDataset([(CLIPS[0], "c")], classes=["a", "b"])
    columns = {"one": Video(), "two": Video()}
    with pytest.raises(
        ValueError, match="the data set has the Video columns 'one', 'two'; accepted: one, or one named"
    ):
        MappedDataset(HuggingFace({"one": [1], "two": [2]}, columns))


def test_bytes_that_are_no_video_are_called_the_video(path):
    """Not by the name of a temporary copy, with which neither reasons nor digests would repeat."""
    content = path.read_bytes()
    pairs = [(content, 0), (b"", 1), (b"x" * 50, 1), (content[:-900], 1), (b"OggS" * 20, 1)]
    mapped = MappedDataset(pairs, sampling=SMALL)
    assert mapped.digest == MappedDataset(pairs, sampling=SMALL).digest
    assert mapped.digest != MappedDataset([*pairs[:2], pairs[0], *pairs[3:]], sampling=SMALL).digest
    with pytest.warns(UserWarning, match="skipped item 1: the video is empty"):
        assert len(next(load(mapped, 5)).clips) == 1
    assert len(mapped.skipped) == 4 and all(reason.startswith("the video ") for reason in mapped.skipped.values())
    with pytest.raises(ValueError, match="^item 0: the video is empty"):
        MappedDataset(pairs[1:], sampling=SMALL)


def test_digests_and_draws(path):
    first, same, other = (MappedDataset(pairs).digest for pairs in (PAIRS, list(PAIRS), PAIRS[::-1]))
    assert first == same != other and first != MappedDataset(PAIRS, classes=["a", "b"]).digest
    assert (
        MappedDataset(huggingface(path), sampling=SMALL).digest
        == MappedDataset(huggingface(path, 0), sampling=SMALL).digest
    )
    found, labels = draws(MappedDataset(PAIRS), 3)(0, 0, 3)
    assert sorted(labels.tolist()) == [0, 1, 1] and found.shape == (3, 3, 4, 16, 16)
