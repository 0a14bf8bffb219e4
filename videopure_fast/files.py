"""Files that appear only when they are complete, and checks that a file or folder can be written."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: partial files carry no lock there, and those of killed processes stay
    fcntl = None  # type: ignore[assignment]

# x264's options for equal frames to make equal bits. With its macroblock tree (core 165) small clips come out with
# differing bits now and then, even on one thread; without it, or without SIMD code, none did. Threads, by default as
# many as cores allow, change the bits too.
REPEATABLE_H264 = {"mbtree": "0", "threads": "1"}
_STEM = 50  # characters of a file's name that its partial file's name repeats: at most 200 bytes of the usual 255


def check_writable(path: str | os.PathLike[str]) -> None:
    """ValueError unless a file can be made at this path, or a regular file there be replaced.

    Its partial file is made and removed, which proves the name and the folder.
    """
    try:
        target = resolve_output(path)
        if not target.parent.is_dir():
            raise ValueError(f"cannot write {path}: there is no folder {target.parent}")
        if target.is_dir():
            raise ValueError(f"cannot write {path}: it is a folder")
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(os.lstat(target).st_mode):
                raise ValueError(f"cannot write {path}: it is no regular file")
        partial, lock = _make_partial(target, Path(path).suffix)
        _remove(partial, lock)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error


def make_folder(path: str | os.PathLike[str]) -> None:
    """Create a folder and its parents where absent. ValueError if it cannot be made or written to."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ValueError(f"cannot make the folder {path}: {getattr(error, 'strerror', error)}") from error
    if not os.access(path, os.W_OK):
        raise ValueError(f"cannot write to {path}")


def check_folder(path: str | os.PathLike[str]) -> None:
    """ValueError unless the folder is there and can be written to, or can be made. Makes nothing."""
    there = next(place for place in (Path(path).absolute(), *Path(path).absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        raise ValueError(f"cannot make the folder {path}: {there} is no folder")
    if not os.access(there, os.W_OK):
        raise ValueError(f"cannot write to {there}")


def clashing(read: Sequence[str | os.PathLike[str]], written: Sequence[str | os.PathLike[str]]) -> str | None:
    """The first of the files to write that is read too, or written twice, by whatever name; None if there is none."""
    places = [os.path.realpath(path) for path in (*read, *written)]
    clashes = (path for path, place in zip(written, places[len(read) :], strict=True) if places.count(place) > 1)
    return next(map(str, clashes), None)


def resolve_output(path: str | os.PathLike[str]) -> Path:
    """The file that writing to the path replaces: where symbolic links lead, so that the links stay.

    ValueError for a NUL in the name and for links that lead in a circle.
    """
    if "\0" in os.fspath(path):
        raise ValueError(f"cannot write {str(path)!r}: its name has a NUL")
    if not os.path.islink(path):
        return Path(path)
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise ValueError(f"cannot write {path}: its symbolic links lead in a circle")
    return target


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a partial file's path in the folder of the file that is written, for the block to write.

    That file is `path`, or where it links; the partial file has the extension of `path`, by which libraries choose the
    format. It replaces the file when the block succeeds, and is deleted when it raises. Those that killed processes
    left of the same path are deleted first.
    """
    target = resolve_output(path)
    remove_stale_partials(path)
    partial, lock = _make_partial(target, Path(path).suffix)
    try:
        yield partial
        os.replace(partial, target)
    finally:
        _remove(partial, lock)


def remove_stale_partials(path: str | os.PathLike[str]) -> None:
    """Delete the partial files of this path whose process is gone: nobody holds the lock on them."""
    if fcntl is None:
        return
    target = resolve_output(path)
    stem, suffix = re.escape(target.stem[:_STEM]), re.escape(Path(path).suffix)
    partials = re.compile(rf"\.{stem}-[0-9a-f]{{8}}\.partial{suffix}")
    names: list[str] = []
    with contextlib.suppress(OSError):  # a folder that may be written and not read
        names = os.listdir(target.parent)
    for name in filter(partials.fullmatch, names):
        partial = target.with_name(name)
        with contextlib.suppress(OSError):  # held by a live process, another's, or deleted meanwhile
            lock = os.open(partial, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                partial.unlink()
            finally:
                os.close(lock)


def _make_partial(target: Path, suffix: str) -> tuple[Path, int | None]:
    """A new empty file, with this extension, for what will replace the target, and the descriptor of its lock.

    The lock ends with the process, however that ends, and is seen from other containers and machines too. The file is
    not one of tempfile: only its owner could read that, and the renamed file would keep those permissions.
    """
    while True:
        partial = target.with_name(f".{target.stem[:_STEM]}-{secrets.token_hex(4)}.partial{suffix}")
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if fcntl is None:  # an open file could not be renamed on Windows
            os.close(descriptor)
            return partial, None
        with contextlib.suppress(OSError):  # a file system without locks: nobody deletes the file there
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if partial.exists():
            return partial, descriptor
        os.close(descriptor)  # `remove_stale_partials` of another process came between the file and its lock


def _remove(partial: Path, lock: int | None) -> None:
    partial.unlink(missing_ok=True)
    if lock is not None:
        os.close(lock)
