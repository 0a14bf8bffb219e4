import contextlib
import sqlite3

import pytest
from scale_files import IDENTITY

from videopure_fast.scale import manifest as manifests
from videopure_fast.scale.manifest import Manifest, check_identity, locked, read_rows
from videopure_fast.scale.rows import Row


def test_rows_come_back_and_replace_those_of_their_file(tmp_path):
    path = tmp_path / "m.sqlite"
    rows = [
        Row("a\n'.mp4", "a.mp4", "done", 5, "i", 7, "o", "s", "w", 3, "no sound", None),
        Row("b", "b", "failed", error="e"),
    ]
    manifest = Manifest(path, IDENTITY)
    manifest.add(rows)
    manifest.close()
    assert read_rows(path) == rows
    manifest = Manifest(path, IDENTITY)
    manifest.add([rows[1]._replace(state="done", error=None)])
    manifest.close()
    assert read_rows(path) == [rows[0], Row("b", "b", "done")]
    assert read_rows(tmp_path / "none") == []
    assert [path.name for path in tmp_path.iterdir()] == ["m.sqlite"]  # no journal stays


def test_rows_are_committed_while_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(manifests, "_COMMIT_SECONDS", 0.0)
    manifest = Manifest(tmp_path / "m.sqlite", IDENTITY)
    manifest.add([Row("a", "a", "done")])
    assert len(read_rows(tmp_path / "m.sqlite")) == 1
    manifest.close()


def test_other_settings_are_refused_by_name(tmp_path):
    path = tmp_path / "m.sqlite"
    Manifest(path, IDENTITY).close()
    check_identity(path, dict(IDENTITY))
    check_identity(tmp_path / "none", IDENTITY)
    for check in (Manifest, check_identity):
        with pytest.raises(ValueError, match=r"were made with size 16, and not with size 32: ask for the same again"):
            check(path, IDENTITY | {"size": 32})


def test_what_is_no_manifest(tmp_path):
    path = tmp_path / "m.sqlite"
    path.write_text("no database\n" * 200)
    for use in (lambda: Manifest(path, IDENTITY), lambda: read_rows(path), lambda: check_identity(path, IDENTITY)):
        with pytest.raises(ValueError, match="is no manifest of purified files"):
            use()


@pytest.mark.parametrize("begun", ["", "CREATE TABLE files (name)", "CREATE TABLE identity (json TEXT)"])
def test_a_manifest_that_is_half_made_is_none(tmp_path, begun):
    path = tmp_path / "m.sqlite"
    path.touch()
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute(begun)
    assert read_rows(path) == []
    check_identity(path, IDENTITY)


def test_a_manifest_is_made_at_once_or_not_at_all(tmp_path):
    path = tmp_path / "m.sqlite"
    with pytest.raises(TypeError):
        Manifest(path, {"size": object()})  # ends after the tables
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
    Manifest(path, IDENTITY).close()
    with pytest.raises(ValueError, match="size 16, and not with size 32"):
        check_identity(path, IDENTITY | {"size": 32})


def test_a_manifest_that_another_deletes_is_not_made_anew(tmp_path, monkeypatch):
    path, connect = tmp_path / "m.sqlite", sqlite3.connect
    Manifest(path, IDENTITY).close()

    def late(*arguments, **options):
        path.unlink()
        return connect(*arguments, **options)

    monkeypatch.setattr(sqlite3, "connect", late)
    assert read_rows(path) == [] and not path.exists()


def test_the_database_of_another_program_is_refused(tmp_path):
    path = tmp_path / "m.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE songs (title)")
    with pytest.raises(ValueError, match=r"is no manifest of purified files \(it has other tables\)"):
        check_identity(path, IDENTITY)


def test_a_full_disk_is_said(tmp_path):
    manifest = Manifest(tmp_path / "m.sqlite", IDENTITY)
    manifest._database.execute("PRAGMA max_page_count = 1")
    with pytest.raises(OSError, match="full"):
        manifest.add([Row(f"{i}", "x" * 5000, "done") for i in range(20)])
    manifest._database.close()
    assert sqlite3.connect(tmp_path / "m.sqlite").execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_locks(tmp_path):
    lock = tmp_path / "state" / "lock"
    lock.parent.mkdir()
    with locked(lock), pytest.raises(ValueError, match="another process works in"), locked(lock, shared=True):
        pass
    with locked(lock, shared=True), locked(lock, shared=True):
        with pytest.raises(ValueError, match="another process works in"), locked(lock):
            pass
    with locked(lock):
        pass
