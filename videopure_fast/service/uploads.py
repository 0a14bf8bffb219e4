"""Videos that are uploaded: received piece by piece within limits, into a folder that does not outlive its process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from .limits import Limits, refusal

if TYPE_CHECKING:
    from starlette.requests import Request

try:
    import fcntl
except ImportError:  # Windows: folders carry no lock there, and those of killed processes stay
    fcntl = None  # type: ignore[assignment]

VIDEO = "video"  # name of the field, and of its file
_PREFIX = "videopure-fast-uploads-"
_LOCK = "lock"
_FIELDS = (VIDEO, "steps", "deadline")
_ACCEPTED = "accepted: multipart/form-data with a file `video`, and `steps` and `deadline` if wanted, each once"
_FORM_BYTES = 2**16  # of a form beside its video
_LONGEST_VALUE = 32  # bytes of `steps` and `deadline`
_LONGEST_HEADERS = 2**13  # bytes of the lines before a part, which may have the name of a file


class Upload(NamedTuple):
    """A form that has come: the folder with the file `video`, and its other fields. deadline: in seconds."""

    folder: Path
    steps: int | None
    deadline: float | None


class UploadFolder:
    """A folder of this process's own, in the system's folder for temporary files, while its block runs.

    Folders of processes that were killed are removed when it begins: nobody holds the lock in them.
    """

    def __init__(self, parent: Path | None = None) -> None:
        self._parent = Path(tempfile.gettempdir()) if parent is None else parent

    def __enter__(self) -> UploadFolder:
        _remove_stale(self._parent)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self._parent))  # for nobody but this user
            try:
                self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            except FileNotFoundError:  # another process took the empty folder for a stale one
                continue
            if fcntl is not None:
                with contextlib.suppress(OSError):  # a file system without locks: nobody removes the folder there
                    fcntl.flock(self._lock, fcntl.LOCK_EX)
            if (self.path / _LOCK).exists():
                return self
            os.close(self._lock)  # the other process came between the file and its lock

    def __exit__(self, *_error: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    @contextlib.contextmanager
    def place(self) -> Iterator[Path]:
        """A folder in it for one request, while the block runs."""
        try:
            place = Path(tempfile.mkdtemp(dir=self.path))
        except OSError as error:
            raise refusal(503, f"the service has no place for an upload ({error.strerror})", 1) from error
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)


def _remove_stale(parent: Path) -> None:
    """Remove this user's folders of uploads whose process is gone."""
    if fcntl is None:
        return
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # of a live process, of another user, or removed meanwhile
            if folder.is_symlink() or folder.lstat().st_uid != os.getuid():
                continue
            with contextlib.suppress(OSError):
                folder.rmdir()  # a process was killed before it made the lock
                continue
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(lock)


async def receive_upload(request: Request, folder: Path, limits: Limits) -> Upload:
    """Receive a form into a folder.

    HTTPException for one that exceeds a limit, comes too slowly, or is not as the service takes it; ClientDisconnect.
    Nothing that the client says about it, its length, the file's name or its type, is trusted.
    """
    if request.query_params:
        raise refusal(400, f"the address has a query; {_ACCEPTED}")
    boundary, most = _boundary(request), limits.bytes + _FORM_BYTES
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and int(stated[:20]) > most:
        raise _too_large(limits)
    form = _Form(limits)
    parser = MultipartParser(boundary, form.callbacks)
    received = 0
    try:
        with open(folder / VIDEO, "xb", buffering=0) as file:
            form.file = file
            async for chunk in _in_time(request.stream(), limits):
                received += len(chunk)
                if received > most:
                    raise _too_large(limits)
                parser.write(chunk)
    except FormParserError as error:
        raise refusal(400, f"the form cannot be read; {_ACCEPTED}") from error
    except OSError as error:
        raise refusal(503, f"the upload cannot be kept ({error.strerror})", 1) from error
    return form.upload(folder)


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data":
        raise refusal(415, f"the request has no form; {_ACCEPTED}")
    boundary: bytes = options.get(b"boundary", b"")
    if not re.fullmatch(rb"[\x20-\x7e]{1,70}", boundary):
        raise refusal(400, "the form's boundary cannot be used; accepted: 1 to 70 characters of ASCII")
    return boundary


def _too_large(limits: Limits) -> Exception:
    return refusal(413, f"the video is too large; accepted: {limits.bytes} bytes at most")


async def _in_time(stream: Any, limits: Limits) -> AsyncIterator[bytes]:
    """The pieces of a body; 408 where the next one, or all of them, take too long."""
    end = time.monotonic() + limits.upload
    while True:
        left = end - time.monotonic()
        try:
            chunk = await asyncio.wait_for(anext(stream), min(limits.idle, max(0.0, left)))
        except StopAsyncIteration:
            return
        except asyncio.TimeoutError:
            slow = f"took more than {limits.upload:g} s" if left <= limits.idle else f"paused for {limits.idle:g} s"
            raise refusal(408, f"the upload {slow}; accepted: a faster one, or a smaller video") from None
        yield chunk


class _Form:
    """What the parser finds in a form: the video goes to `file`, other fields are kept. HTTPException for bad ones."""

    def __init__(self, limits: Limits) -> None:
        self.file: BinaryIO | None = None
        self._limits = limits
        self._fields: dict[str, bytes] = {}
        self._field = ""  # the one that is read
        self._length = 0  # of the video, or of the lines before a part
        self._headers: dict[bytes, bytes] = {}
        self._header, self._value = b"", b""
        self._ended = False

    @property
    def callbacks(self) -> Any:
        names = "part_begin part_data header_field header_value header_end headers_finished end".split()
        return {f"on_{name}": getattr(self, f"_on_{name}") for name in names}

    def upload(self, folder: Path) -> Upload:
        """What has come; 400 or 415 where it is not all there."""
        if not self._ended:
            raise refusal(400, f"the form breaks off; {_ACCEPTED}")
        if VIDEO not in self._fields:
            raise refusal(415, f"the form has no video; {_ACCEPTED}")
        most = self._limits.answer
        steps = self._number("steps", r"\d{1,4}", int, "a whole number")
        deadline = self._number("deadline", r"\d{1,6}(\.\d{1,9})?", float, f"seconds, more than 0, at most {most:g}")
        if deadline is not None and not 0 < deadline <= most:
            raise refusal(400, f"deadline is {deadline:g}; accepted: seconds, more than 0, at most {most:g}")
        return Upload(folder, steps, deadline)

    def _number(self, name: str, pattern: str, kind: Callable[[str], Any], accepted: str) -> Any:
        text = self._fields.get(name, b"").decode("latin-1").strip()
        if text and not re.fullmatch(pattern, text, re.ASCII):
            raise refusal(400, f"{name} cannot be read; accepted: {accepted}")
        return kind(text) if text else None

    def _on_part_begin(self) -> None:
        self._headers, self._length = {}, 0

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]
        self._count(end - start)

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]
        self._count(end - start)

    def _count(self, length: int) -> None:
        self._length += length
        if self._length > _LONGEST_HEADERS:
            raise refusal(400, f"the lines before a part of the form are too long; {_ACCEPTED}")

    def _on_header_end(self) -> None:
        self._headers[self._header.lower()] = self._value
        self._header, self._value = b"", b""

    def _on_headers_finished(self) -> None:
        kind, options = parse_options_header(self._headers.get(b"content-disposition", b"").decode("latin-1"))
        name = options.get(b"name", b"").decode("latin-1")
        if kind != b"form-data" or name not in _FIELDS:
            raise refusal(400, f"the form has a part that is not known; {_ACCEPTED}")
        if name in self._fields:
            raise refusal(400, f"the form has the field {name} twice; {_ACCEPTED}")
        self._fields[name] = b""
        self._field, self._length = name, 0

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._field == VIDEO:
            self._length += end - start
            if self._length > self._limits.bytes:
                raise _too_large(self._limits)
            assert self.file is not None
            piece = memoryview(data)[start:end]
            while piece:
                piece = piece[self.file.write(piece) :]  # a file without a buffer may take a part
            return
        self._fields[self._field] += data[start:end]
        if len(self._fields[self._field]) > _LONGEST_VALUE:
            raise refusal(400, f"{self._field} is too long; accepted: {_LONGEST_VALUE} characters at most")

    def _on_end(self) -> None:
        self._ended = True
