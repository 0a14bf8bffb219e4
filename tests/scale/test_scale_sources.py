import errno
import os

import pytest

from videopure_fast.data.datasets import VideoDataset
from videopure_fast.scale.sources import (
    check_apart,
    check_no_replacement,
    dataset_jobs,
    folder_jobs,
    listed_jobs,
)


@pytest.fixture
def videos(tmp_path):
    root = tmp_path / "videos"
    for name in ("b.mp4", "a/c.AVI", "a/deep/d.webm", ".hidden/e.mp4", "a/.f.mp4", "notes.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def names(jobs):
    return [(job.name, job.output) for job in jobs]


def test_a_folder_and_all_below_it(videos):
    (videos / "a" / "up").symlink_to(videos)  # a circle
    jobs = folder_jobs(videos, ".mp4")
    assert names(jobs) == [("a/c.AVI", "a/c.mp4"), ("a/deep/d.webm", "a/deep/d.mp4"), ("b.mp4", "b.mp4")]
    assert [job.source for job in jobs] == [str(videos / job.name) for job in jobs]
    assert [job.output for job in folder_jobs(videos, ".safetensors")][0] == "a/c.safetensors"
    assert names(folder_jobs(videos / ".hidden" / "..", ".mp4")) == names(jobs)
    (videos / "none").mkdir()
    with pytest.raises(ValueError, match="has no videos"):
        folder_jobs(videos / "none", ".mp4")


def test_a_folder_that_cannot_be_listed_is_not_left_out(videos, monkeypatch):
    scandir = os.scandir

    def refusing(place):
        if str(place).endswith("deep"):
            raise PermissionError(errno.EACCES, "Permission denied", place)
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(OSError, match=r"cannot list the folder .*a/deep: Permission denied"):
        folder_jobs(videos, ".mp4")


@pytest.mark.parametrize("name", ["-rf.mp4", "a\nb.mp4", "'; DROP TABLE files.mp4", "ü😀.mp4", "%s{}.mp4", " .mp4"])
def test_hostile_names_are_names(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    assert names(folder_jobs(tmp_path, ".mp4")) == [(name, name)]


def test_names_that_are_not_utf8_are_shown_escaped(tmp_path):
    raw = os.fsencode(tmp_path) + b"/a\xff.mp4"
    with open(raw, "wb"):
        pass
    (job,) = folder_jobs(tmp_path, ".mp4")
    assert (job.name, os.fsencode(job.source)) == ("a\\udcff.mp4", raw)


def test_two_videos_of_one_output_are_refused_by_name(videos):
    (videos / "a" / "c.mp4").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"a/c.AVI and a/c.mp4 would both become a/c.mp4"):
        folder_jobs(videos, ".mp4")


def test_a_list(videos, tmp_path):
    listing = videos / "list.txt"
    listing.write_text(f"a/deep/d.webm\n\n{videos}/b.mp4\n./a/deep/d.webm\ngone.mp4\nno extension\n")
    found = [("a/deep/d.webm", "a/deep/d.mp4"), ("b.mp4", "b.mp4"), ("gone.mp4", "gone.mp4")]
    found.append(("no extension", "no extension.mp4"))
    assert names(listed_jobs(listing, videos, ".mp4")) == found
    elsewhere = tmp_path / "list.txt"
    elsewhere.write_text("b.mp4\n")
    assert listed_jobs(elsewhere, videos, ".mp4")[0].source == str(videos / "b.mp4")


@pytest.mark.parametrize("line", ["../b.mp4", "/etc/passwd", "a/../../b.mp4", "a\\b.mp4", "C:/b.mp4"])
def test_a_list_does_not_lead_out_of_its_folder(videos, line):
    listing = videos / "list.txt"
    listing.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"leads out of|has a backslash"):
        listed_jobs(listing, videos, ".mp4")


def test_what_is_no_list(videos):
    with pytest.raises(ValueError, match="is one video: use `videopure-fast purify`"):
        listed_jobs(videos / "b.mp4", videos, ".mp4")
    (videos / "list.txt").write_text("\n")
    with pytest.raises(ValueError, match="lists no videos"):
        listed_jobs(videos / "list.txt", videos, ".mp4")
    (videos / "list.txt").write_text(".videopure-fast/driver/a.mp4\n")
    with pytest.raises(ValueError, match="whose name is taken"):
        listed_jobs(videos / "list.txt", videos, ".mp4")


def test_a_data_set(videos, tmp_path):
    (tmp_path / "classInd.txt").write_text("1 a\n")
    (tmp_path / "testlist01.txt").write_text("a/x.avi\na/c.AVI\n")
    dataset = VideoDataset.ucf101(videos, tmp_path)
    assert names(dataset_jobs(dataset, videos, ".mp4")) == [("a/x.avi", "a/x.mp4"), ("a/c.AVI", "a/c.mp4")]


def test_outputs_are_apart_from_videos(videos, tmp_path):
    check_apart(videos, tmp_path / "out")
    link = tmp_path / "link"
    link.symlink_to(videos)
    for out in (videos, videos / "out", tmp_path, link / "out"):
        with pytest.raises(ValueError, match="must be in folders apart"):
            check_apart(videos, out)
    jobs = folder_jobs(videos, ".mp4")
    check_no_replacement(jobs, tmp_path / "out")
    with pytest.raises(ValueError, match=r"the output of b.mp4 would replace b.mp4"):
        check_no_replacement(jobs, link)
