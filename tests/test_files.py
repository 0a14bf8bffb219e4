"""Files appear when they are complete, links are followed, and what killed processes left is cleared away."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from videopure_fast import files
from videopure_fast.files import atomic_write, check_writable, make_folder, remove_stale_partials

HOLD = """
import sys, time
from videopure_fast.files import atomic_write
with atomic_write(sys.argv[1]) as partial:
    partial.write_text("half")
    print(partial, flush=True)
    time.sleep(60)
"""


def writing(path: Path) -> tuple[subprocess.Popen, Path]:
    """A process that is writing the file, and its partial file."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_partials_of_killed_processes_go_and_those_of_live_ones_stay(tmp_path):
    path = tmp_path / "a [1].mp4"
    killed, left = writing(path)
    killed.kill()
    killed.wait()
    live, held = writing(path)  # which clears the other's away
    try:
        assert sorted(tmp_path.iterdir()) == [held] and held != left
        held_too = path.with_name(".other-0123abcd.partial.mp4")  # of another file
        held_too.write_text("")
        remove_stale_partials(path)
        assert sorted(tmp_path.iterdir()) == sorted([held, held_too]) and held.read_text() == "half"
    finally:
        live.kill()
        live.wait()
    remove_stale_partials(path)
    assert list(tmp_path.iterdir()) == [held_too]


def test_what_only_looks_like_a_partial_stays(tmp_path):
    names = ["a.mp4", ".a-0123abcd.partial.avi", ".a-0123abc.partial.mp4", "a-0123abcd.partial.mp4", ".a.partial.mp4"]
    for name in names:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".a-00000000.partial.mp4").mkdir()
    (tmp_path / ".a-11111111.partial.mp4").symlink_to("a.mp4")
    before = sorted(tmp_path.iterdir())
    remove_stale_partials(tmp_path / "a.mp4")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("lead", ["{folder}/there/file.json", "there/file.json", "second.json"])
def test_a_link_is_followed_and_stays(tmp_path, lead):
    (tmp_path / "there").mkdir()
    (tmp_path / "second.json").symlink_to("there/file.json")
    link, target = tmp_path / "link.json", tmp_path / "there" / "file.json"
    link.symlink_to(lead.format(folder=tmp_path))
    for content in ("new", "replaced"):  # at first nothing is there
        check_writable(link)
        with atomic_write(link) as partial:
            partial.write_text(content)
            assert partial.parent == target.parent
        assert link.is_symlink() and target.read_text() == content and list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("kept", ["blob", "blob.txt", "blob.png"])
def test_the_partial_file_of_a_link_has_the_links_extension(tmp_path, kept):
    """By which libraries choose the format, whatever the file is called to which it leads."""
    link, target = tmp_path / "accuracy.svg", tmp_path / kept
    link.symlink_to(kept)
    stale = tmp_path / ".blob-0123abcd.partial.svg"  # of a killed process
    stale.write_text("half")
    check_writable(link)
    with atomic_write(link) as partial:
        assert partial.suffix == ".svg" and not stale.exists()
        partial.write_text("<svg/>")
    assert target.read_text() == "<svg/>" and sorted(tmp_path.iterdir()) == sorted([link, target])


def test_the_usual_permissions_hold(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "a.txt") as partial:
            partial.write_text("a")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640


def test_without_locks_files_are_written_too(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    with atomic_write(tmp_path / "a.txt") as partial:
        partial.write_text("a")
    assert list(tmp_path.iterdir()) == [tmp_path / "a.txt"]


@pytest.mark.parametrize("name", ["a.json", "x" * 250 + ".json", "é" * 125 + ".json", ".json", "a b\n.json", "x" * 255])
def test_names_that_a_file_can_have_are_proved(tmp_path, name):
    check_writable(tmp_path / name)
    assert not list(tmp_path.iterdir())
    with atomic_write(tmp_path / name) as partial:
        partial.write_text("a")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("x" * 251 + ".json", "File name too long"),
        ("é" * 126 + ".json", "File name too long"),
        ("y" * 300 + "/a.json", "File name too long"),
        ("a\0.json", "its name has a NUL"),
        ("circle.json", "its symbolic links lead in a circle"),
        ("nowhere.json", "there is no folder"),
        ("file.txt/a.json", "there is no folder"),
        ("pipe", "it is no regular file"),
        ("null", "it is no regular file"),
        ("", "it is a folder"),
    ],
)
def test_names_that_cannot_be_written_are_refused(tmp_path, name, why):
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "circle.json").symlink_to("circle.json")
    (tmp_path / "nowhere.json").symlink_to("nowhere/a.json")
    (tmp_path / "null").symlink_to("/dev/null")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=f"cannot write .*{why}"):
        check_writable(f"{tmp_path}/{name}")
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    for name in ("a\0b", "x" * 300, "file/folder"):
        (tmp_path / "file").write_text("")
        with pytest.raises(ValueError, match="cannot make the folder"):
            make_folder(f"{tmp_path}/{name}")
