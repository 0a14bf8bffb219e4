"""Answers that are made while their client is watched: one that goes away is worked for no longer."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from .engine import Engine, Purified
from .limits import refusal
from .live import Frames
from .uploads import Upload, receive_upload

LINES = "application/x-ndjson"
VIDEO = "video/mp4"
MOTION = "multipart/x-mixed-replace; boundary=frame"
_BUSY_RETRY = 2.0  # seconds after which an upload, or a viewer, may find a place
T = TypeVar("T")


async def while_connected(receive: Any, work: Coroutine[Any, Any, T]) -> T:
    """The result of work, which is canceled when the client goes away; that raises ClientDisconnect.

    The body of the request has been received.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class PurifyAnswer(Response):
    """Receives a video and answers with the purified one, or with lines of JSON while it is computed."""

    media_type = VIDEO

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._engine = engine
        self._started = False  # whether lines are sent

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        engine, request = self._engine, Request(scope, receive)
        engine.check_ready()
        if engine.uploading >= engine.limits.uploads:
            sentence = f"the service is busy: {engine.uploading} videos come in already; try again later"
            raise refusal(503, sentence, max(_BUSY_RETRY, engine.line.retry_after))
        try:
            with engine.uploads.place() as folder:
                upload = await self._receive(request, folder)
                if LINES in request.headers.get("accept", ""):
                    await while_connected(receive, self._send_lines(upload, send))
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
                    return
                result = await while_connected(receive, engine.purify(upload, lambda event: None, before=False))
        except ClientDisconnect:
            engine.metrics.gone.inc()
            return
        except asyncio.CancelledError:
            if not engine.closing.is_set():
                raise
            error = refusal(503, "the service has ended; the video was given up", _BUSY_RETRY)
            if not self._started:
                raise error from None
            await _line(send, _error_event(error))
            return
        await Response(result.after, headers=_headers(result), media_type=VIDEO)(scope, receive, send)

    async def _receive(self, request: Request, folder: Any) -> Upload:
        engine = self._engine
        engine.uploading += 1
        engine.metrics.uploads.set(engine.uploading)
        try:
            upload = await receive_upload(request, folder, engine.limits)
        finally:
            engine.uploading -= 1
            engine.metrics.uploads.set(engine.uploading)
        engine.metrics.bytes.inc((folder / "video").stat().st_size)
        return upload

    async def _send_lines(self, upload: Upload, send: Any) -> None:
        """All of the answer but its end. What fails before the first event is an answer of its own: HTTPException."""
        events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        work = asyncio.ensure_future(self._engine.purify(upload, events.put_nowait, before=True))
        work.add_done_callback(lambda _: events.put_nowait(None))
        try:
            event = await events.get()
            if event is None:
                work.result()
            self._started = True
            await _start(send, LINES)
            while event is not None:
                await _line(send, event)
                event = await events.get()
            await _line(send, _last_event(work))
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)


def _headers(result: Purified) -> dict[str, str]:
    """What the answer says beside the video. Headers are ASCII: other characters of labels are escaped as in JSON."""
    timing = ", ".join(f"{stage};dur={1000 * seconds:.1f}" for stage, seconds in result.times.items())
    headers = {"Server-Timing": timing}
    if result.label is not None:
        headers |= {"X-Label": json.dumps(result.label)[1:-1], "X-Votes": json.dumps(result.votes)}
    return headers


def _last_event(work: asyncio.Future[Purified]) -> dict[str, Any]:
    try:
        result = work.result()
    except HTTPException as error:
        return _error_event(error)
    assert result.before is not None
    files = {"before": result.before, "after": result.after}
    encoded = {name: base64.b64encode(content).decode() for name, content in files.items()}
    times = {stage: round(seconds, 6) for stage, seconds in result.times.items()}
    return {"event": "done", "label": result.label, "votes": result.votes, "times": times, **encoded}


def _error_event(error: HTTPException) -> dict[str, Any]:
    return {"event": "error", "status": error.status_code, "detail": error.detail}


async def _start(send: Any, media_type: str) -> None:
    headers = [(b"content-type", media_type.encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _line(send: Any, event: dict[str, Any]) -> None:
    await send({"type": "http.response.body", "body": json.dumps(event).encode() + b"\n", "more_body": True})


class LiveAnswer(Response):
    """Pictures of a source, each in the place of the one before, until it ends or its viewer goes away."""

    media_type = MOTION

    def __init__(self, engine: Engine, frames: Frames) -> None:
        super().__init__()
        self._engine, self._frames = engine, frames

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        engine = self._engine
        engine.check_ready()
        if engine.viewing >= engine.limits.viewers:
            raise refusal(503, f"{engine.viewing} viewers look at live sources already; try again later", _BUSY_RETRY)
        engine.viewing += 1
        engine.metrics.viewers.set(engine.viewing)
        try:
            await while_connected(receive, self._send_pictures(send))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientDisconnect:
            pass
        finally:
            engine.viewing -= 1
            engine.metrics.viewers.set(engine.viewing)

    async def _send_pictures(self, send: Any) -> None:
        async with contextlib.aclosing(self._frames.view()) as frames:  # type: ignore[type-var]
            picture: bytes | None = await self._first(frames)
            await _start(send, MOTION)
            await send({"type": "http.response.body", "body": b"--frame\r\n", "more_body": True})
            with contextlib.suppress(OSError):  # the source goes away
                while picture is not None:
                    # The next boundary comes with the picture: browsers show it when they see that it is complete.
                    head = b"Content-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(picture)
                    body = head + picture + b"\r\n--frame\r\n"
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                    picture = await self._next(frames)

    async def _first(self, frames: AsyncIterator[bytes]) -> bytes:
        """503 where there is none in time."""
        try:
            if (picture := await asyncio.wait_for(self._next(frames), self._engine.limits.live)) is not None:
                return picture
            reason = "it has ended"
        except asyncio.TimeoutError:
            reason = f"there was no picture for {self._engine.limits.live:g} s"
        except OSError as error:  # the reason without the address, which may have a password
            reason = str(error)
        raise refusal(503, f"the live source shows nothing at present: {reason}", _BUSY_RETRY)

    async def _next(self, frames: AsyncIterator[bytes]) -> bytes | None:
        """The next picture; None when there is none any more, or the service ends."""
        picture = asyncio.ensure_future(anext(frames, None))
        closing = asyncio.ensure_future(self._engine.closing.wait())
        try:
            await asyncio.wait({picture, closing}, return_when=asyncio.FIRST_COMPLETED)
            return picture.result() if picture.done() else None
        finally:
            for one in (picture, closing):
                one.cancel()
            await asyncio.gather(picture, closing, return_exceptions=True)
