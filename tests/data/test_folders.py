"""Folders of videos by class."""

import re

import pytest
from test_datasets import SMALL, write

from videopure_fast.data.datasets import VideoDataset, load


def names(dataset, root):
    return [(sample.path.relative_to(root).as_posix(), sample.label) for sample in dataset.samples]


def touch(root, *files):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(b"x")


def test_class_folders_are_classes_in_alphabetical_order(tmp_path):
    for i, name in enumerate(["bowling/2.mp4", "archery/1.webm", "bowling/1.avi"]):
        write(tmp_path / name, level=40 * i)
    dataset = VideoDataset.folder(tmp_path, sampling=SMALL)
    assert dataset.classes == ("archery", "bowling")
    assert names(dataset, tmp_path) == [("archery/1.webm", 0), ("bowling/1.avi", 1), ("bowling/2.mp4", 1)]
    (batch,) = load(dataset, 3)
    assert batch.labels.tolist() == [0, 1, 1]
    assert (batch.clips.mean((1, 2, 3, 4)) * 255 / 40).round().tolist() == [1, 2, 0]


def test_what_counts_as_a_video(tmp_path):
    touch(tmp_path, "b/UPPER.MP4", "b/deep/er/x.MoV", "b/.hidden.mp4", "b/._x.mp4", "b/.cache/y.mp4", "a/z.mkv")
    touch(tmp_path, ".git/c.mp4", ".DS_Store", "readme.txt")
    dataset = VideoDataset.folder(tmp_path)
    assert names(dataset, tmp_path) == [("a/z.mkv", 0), ("b/UPPER.MP4", 1), ("b/deep/er/x.MoV", 1)]
    touch(tmp_path, "a/notes.txt", "a/Thumbs.db", "stray.mp4")
    with pytest.warns(UserWarning) as told:
        assert len(VideoDataset.folder(tmp_path)) == 3
    messages = [str(warning.message) for warning in told]
    assert any("'stray.mp4' left out, since they are in no class's folder" in message for message in messages)
    assert any("'Thumbs.db', 'notes.txt' left out; accepted: files in .avi, .gif" in message for message in messages)


def test_a_folder_of_one_class_and_files_that_are_no_videos(tmp_path):
    touch(tmp_path, "only/broken.mp4")
    write(tmp_path / "only/fine.mp4")
    dataset = VideoDataset.folder(tmp_path, sampling=SMALL)
    with pytest.warns(UserWarning, match=r"skipped .*broken.mp4: .* is damaged or not a video"):
        (batch,) = load(dataset, 2)
    assert batch.labels.tolist() == [0] and list(dataset.skipped) == [tmp_path / "only/broken.mp4"]


def test_links_are_followed_and_not_in_circles(tmp_path):
    touch(tmp_path, "store/1.mp4", "store/2.mp4")
    videos = tmp_path / "videos"
    (videos / "b").mkdir(parents=True)
    (videos / "a").symlink_to(tmp_path / "store")
    (videos / "b" / "one.mp4").symlink_to(tmp_path / "store" / "1.mp4")
    (videos / "b" / "up").symlink_to(videos / "b")
    found = names(VideoDataset.folder(videos), videos)
    assert found == [("a/1.mp4", 0), ("a/2.mp4", 0), ("b/one.mp4", 1)]


def test_classes_may_have_the_names_of_splits(tmp_path):
    touch(tmp_path, "train/1.mp4", "test/2.mp4")
    assert VideoDataset.folder(tmp_path).classes == ("test", "train")


def test_given_classes_are_the_labels(tmp_path):
    touch(tmp_path, "b/1.mp4", "d/1.mp4")
    dataset = VideoDataset.folder(tmp_path, classes=["d", "a", "b"])
    assert dataset.classes == ("d", "a", "b") and names(dataset, tmp_path) == [("b/1.mp4", 2), ("d/1.mp4", 0)]
    with pytest.raises(ValueError, match="has a folder 'd', which is no class; accepted: 'a', 'b'"):
        VideoDataset.folder(tmp_path, classes=["a", "b"])


@pytest.mark.parametrize(
    "files, message",
    [
        ((), "has no folder; accepted: a folder for each class, as "),
        (("1.mp4", "2.mp4"), "has '1.mp4', '2.mp4'; accepted: a folder for each class"),
        (("test/a/1.mp4", "Train/a/2.mp4"), "has the splits 'Train', 'test', not classes; accepted: one of them, as"),
        (("a/1.mp4", "b/notes.txt"), "b is a class without videos, it has 'notes.txt'; accepted: files in .avi, .gif"),
        (("a/1.mp4", "b/.keep"), "b is a class without videos, it has nothing; accepted"),
    ],
)
def test_folders_without_videos_are_refused(files, message, tmp_path):
    touch(tmp_path, *files)
    with pytest.raises(ValueError, match=re.escape(message)):
        VideoDataset.folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        VideoDataset.folder(tmp_path / "nowhere")
