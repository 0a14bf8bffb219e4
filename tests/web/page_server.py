"""A stand-in for the service, so that the page is tested without a model: a video's name says how it is answered."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import io
import json
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from PIL import Image
from starlette.datastructures import UploadFile

import videopure_fast
from videopure_fast.data.video_writer import VideoWriter

WEB = Path(videopure_fast.__file__).parent / "web"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob: data:; "
    "media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
FRAMES, HEIGHT, WIDTH, RATE = 50, 120, 160, 25
WINDOWS, EVALUATIONS, VOTES = 3, 8, 10  # of the answer, a window and a window
CELLO = "playing cello"
LABELS = [*[CELLO] * 3, "archery", CELLO, "surfing water", CELLO, "archery", "bowling", "golf"]
TIMES = {"queue": 0.02, "encode": 0.11, "sample": 1.43, "decode": 0.64, "total": 2.31}
PAUSE = 0.01  # seconds between two lines
HELD_AT = 20  # the line after which the answer to held.mp4 waits: five votes have come


@functools.cache
def mp4(noise: float, height: int = HEIGHT, width: int = WIDTH) -> bytes:
    """A disc that crosses a slope of colors, under noise of this strength."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, width / height, width), indexing="ij")
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        with VideoWriter(path, height=height, width=width, rate=RATE) as writer:
            for frame in torch.linspace(0.2, 1.1, FRAMES):
                disc = torch.sigmoid(80 * (0.2 - torch.hypot(x - frame, y - 0.5 - 0.2 * torch.sin(7 * frame))))
                slope = torch.stack([0.2 + 0.3 * y, 0.35 + 0.2 * x / x.max(), 0.5 - 0.2 * y])
                picture = slope * (1 - disc) + torch.tensor([0.95, 0.7, 0.3])[:, None, None] * disc
                picture += noise * (torch.rand(picture.shape, generator=generator) - 0.5)
                writer.write((255 * picture.clamp(0, 1)).byte())
        return path.read_bytes()


def script(votes: list[str] | None) -> Iterator[dict[str, Any]]:
    """The lines of an answer, up to the last one."""
    yield {"event": "queued", "ahead": 1}
    yield {"event": "started", "windows": WINDOWS, "frames": FRAMES, "height": HEIGHT, "width": WIDTH, "rate": RATE}
    for window in range(WINDOWS):
        step = functools.partial(dict, event="progress", window=window)
        yield step(stage="encode", done=1, total=1)
        yield from (step(stage="evaluate", done=k, total=EVALUATIONS) for k in range(1, EVALUATIONS + 1))
        for k in range(VOTES):
            yield step(stage="decode", done=k + 1, total=VOTES)
            if votes:
                yield {"event": "vote", "window": window, "vote": k, "label": votes[k]}


def result(votes: list[str] | None) -> dict[str, Any]:
    """The last line of an answer."""
    counts = Counter(votes * WINDOWS) if votes else None
    label = counts.most_common(1)[0][0] if counts else None
    videos = {name: base64.b64encode(mp4(noise)).decode() for name, noise in (("before", 0.3), ("after", 0.0))}
    return {"event": "done", "label": label, "votes": counts, "times": TIMES, **videos}


class StandIn:
    """The answers to the page. `left` counts the clients that went away; `seen` has what came, (name, steps)."""

    def __init__(self, token: str | None = None, votes: list[str] | None = LABELS) -> None:
        self.token, self.votes = token, votes
        self.left = 0
        self.seen: list[tuple[str, str | None]] = []
        self.picture = teal()  # of the live source
        self.app = FastAPI()
        self.app.get("/v1/info")(self.info)
        self.app.post("/v1/purify")(self.purify)
        self.app.get("/v1/live/{name}")(self.live)
        self.app.get("/{name:path}")(self.file)

    def file(self, name: str) -> Response:
        return FileResponse(WEB / (name or "index.html"), headers={"Content-Security-Policy": POLICY})

    def refuses(self, request: Request) -> Response | None:
        if self.token is None or request.headers.get("Authorization") == f"Bearer {self.token}":
            return None
        return JSONResponse({"detail": "the token is missing or wrong"}, 401)

    def info(self, request: Request) -> Response:
        limits = {"bytes": 1_000_000, "seconds": 30, "frames": 600, "pixels": 640 * 480}
        about = {"model": "tiny", "frames": 16, "size": 32, "steps": 5, "classes": ["archery"] if self.votes else None}
        return self.refuses(request) or JSONResponse({**about, "limits": limits, "live": ["porch"]})

    async def purify(self, request: Request) -> Response:
        if refusal := self.refuses(request):
            return refusal
        form = await request.form()
        video, steps = form["video"], form.get("steps")
        assert isinstance(video, UploadFile) and request.headers["Accept"] == "application/x-ndjson"
        self.seen.append((video.filename or "", steps))
        match Path(video.filename or "").stem:
            case "busy":
                return JSONResponse(
                    {"detail": "the service is busy: 8 videos wait already; try again later"}, 503, {"Retry-After": "7"}
                )
            case "bare":
                return Response("<h1>Bad Gateway</h1>", 502, media_type="text/html")
            case "notes":
                return JSONResponse({"detail": "the video is damaged; accepted: mp4"}, 400)
            case kind:
                return StreamingResponse(self.lines(request, kind), media_type="application/x-ndjson")

    async def lines(self, request: Request, kind: str) -> AsyncIterator[str]:
        whole = False
        try:
            for i, line in enumerate(script(self.votes)):
                yield json.dumps(line) + "\n"
                await asyncio.sleep(PAUSE)
                while kind == "held" and i == HELD_AT:
                    await asyncio.sleep(PAUSE)
                    if await request.is_disconnected():
                        return
            if kind == "late":
                yield json.dumps({"event": "error", "status": 504, "detail": "the deadline was missed by 0.2 s"}) + "\n"
            elif kind != "broken":
                yield json.dumps(result(self.votes)) + "\n"
            whole = True
        finally:
            self.left += not whole

    def live(self, name: str) -> Response:
        async def parts() -> AsyncIterator[bytes]:
            try:
                while True:
                    head = b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(self.picture)
                    for half in (head + self.picture[:9], self.picture[9:] + b"\r\n"):
                        yield half
                        await asyncio.sleep(PAUSE)
            finally:
                self.left += 1

        return StreamingResponse(parts(), media_type="multipart/x-mixed-replace; boundary=frame")


def teal() -> bytes:
    """A picture as a JPEG."""
    picture = io.BytesIO()
    Image.new("RGB", (64, 48), "teal").save(picture, "JPEG")
    return picture.getvalue()


@contextlib.contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """The address of an app that is served meanwhile."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server ended at once"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        thread.join()
