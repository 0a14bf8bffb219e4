"""The service as an application of ASGI: its addresses, over one purifier."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from importlib.resources import files
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from torch import nn

from ..machine import installed
from ..purifier import Purifier
from .answers import LINES, MOTION, VIDEO, LiveAnswer, PurifyAnswer
from .engine import Engine
from .limits import Limits, refusal
from .live import Frames
from .security import LOCAL_HOSTS, Guard, check_hosts, check_token

_WEB = "videopure_fast.web"
# The page and what it asks for; what else is in that folder is not served.
_PAGE = {
    "index.html": "text/html",
    "page.js": "text/javascript",
    "player.js": "text/javascript",
    "style.css": "text/css",
}
_FREE = ("/healthz", "/readyz")  # paths that need no token, beside the page's
_ERRORS = {
    400: "A field, or a video, that cannot be read",
    401: "The token is missing, or wrong",
    403: "A request for another host, or from another page",
    408: "An upload that is too slow",
    413: "A video that is too large, too long, or of too many frames or pixels",
    415: "No form, or no video in it",
    503: "Busy, warming up or ending: `Retry-After` says when to try again",
    504: "The answer was not there before the deadline",
}
_STRING = {"type": "string"}
_FORM = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["video"],
                "properties": {
                    "video": {"type": "string", "format": "binary", "description": "mp4, mov, avi, gif, webm, mkv, ts"},
                    "steps": {"type": "integer", "description": "Depth of the purification, in the place of the own"},
                    "deadline": {"type": "number", "description": "Seconds after which the answer is of no use"},
                },
            }
        }
    },
}
_HEADERS = {
    "X-Label": {"schema": _STRING, "description": "The majority over all votes, where there is a classifier"},
    "X-Votes": {"schema": _STRING, "description": "The number of votes by label, as JSON"},
    "Server-Timing": {"schema": _STRING, "description": "Milliseconds by stage"},
}


def create_app(
    purifier: Purifier,
    classifier: nn.Module | None = None,
    *,
    model: str = "tiny",
    size: int = 64,
    limits: Limits = Limits(),  # noqa: B008  (immutable)
    sources: Mapping[str, str | Frames] = MappingProxyType({}),
    token: str | None = None,
    hosts: Sequence[str] | None = LOCAL_HOSTS,
) -> FastAPI:
    """The service of a purifier, and with a classifier of clips (B, 3, F, H, W) in [0, 1] also of its labels.

    Args:
        purifier: of a deterministic method, without feedback, as for a StreamPurifier.
        classifier: on the purifier's device.
        model: the purifier's name, as it is shown.
        size: short side of the purified frames in pixels; even, 16 or more.
        limits: bounds of what requests may ask.
        sources: live sources by name: files, addresses or devices, as for `watch`.
        token: what requests must bring; None for none. Without one, whoever reaches the port may use the service.
        hosts: names of the service that requests may state, without ports; None for any, where a token protects it: a
            page elsewhere could otherwise call a service of this machine by a name of its own.

    Its `state.engine` does the work, while the application's lifespan lasts.

    TypeError or ValueError for arguments that differ.
    """
    if token is not None:
        check_token(token)
    if hosts is not None:
        check_hosts(hosts)
    engine = Engine(purifier, classifier, model=model, size=size, limits=limits, sources=sources)

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            await engine.stop()

    # The pages that FastAPI makes of the schema would load scripts from elsewhere.
    options = {"docs_url": None, "redoc_url": None, "redirect_slashes": False}
    app = FastAPI(title="videopure_fast", version=installed("videopure-fast") or "source", lifespan=lifespan, **options)
    app.state.engine = engine
    names = None if hosts is None else [host.lower().rstrip(".") for host in hosts]
    free = [*_FREE, *_add_page(app)]
    app.add_middleware(Guard, hosts=names, token=token, free=free, observe=engine.metrics.observe)
    app.add_exception_handler(HTTPException, _refused)
    _add_status(app, engine)
    _add_videos(app, engine)
    return app


async def _refused(request: Request, error: Any) -> Response:
    """Errors are JSON with one sentence."""
    detail = error.detail
    if error.status_code == 404 and detail == "Not Found":
        accepted = "accepted: /v1/purify, /v1/info, /v1/live/NAME, and the page at /"
        detail = f"there is nothing at {request.url.path[:200]}; {accepted}"
    elif error.status_code == 405:
        detail = f"{request.method[:20]} is not accepted here; accepted: {(error.headers or {}).get('Allow', 'GET')}"
    return JSONResponse({"detail": detail}, error.status_code, error.headers)


def _add_page(app: FastAPI) -> list[str]:
    """The page and what it asks for; returns their paths."""

    def add(path: str, content: bytes, media_type: str) -> None:
        @app.get(path, include_in_schema=False)
        async def file() -> Response:
            return Response(content, media_type=media_type)

    folder, paths = files(_WEB), []
    for name, media_type in _PAGE.items():
        path = "/" if name == "index.html" else f"/{name}"
        add(path, folder.joinpath(name).read_bytes(), media_type)
        paths.append(path)
    return paths


def _add_status(app: FastAPI, engine: Engine) -> None:
    @app.get("/healthz", summary="Whether the process answers")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz", summary="Whether it is warm, and takes videos", responses=_described(503))
    async def readyz() -> dict[str, str]:
        engine.check_ready()
        return {"status": "ready"}

    @app.get("/metrics", summary="Numbers for Prometheus", response_class=Response, responses=_described(401))
    async def metrics() -> Response:
        return Response(engine.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/info", summary="The model, its classes, the limits, and the live sources", responses=_described(401))
    async def info() -> dict[str, Any]:
        limits = engine.limits
        return {
            "model": engine.model,
            "frames": engine.window,
            "size": engine.size,
            "steps": engine.steps,
            "classes": engine.classes,
            "limits": {name: getattr(limits, name) for name in ("bytes", "seconds", "frames", "pixels")},
            "live": list(engine.live),
        }


def _add_videos(app: FastAPI, engine: Engine) -> None:
    answers: dict[int | str, dict[str, Any]] = {
        200: {"content": {VIDEO: {}, LINES: {}}, "description": "The purified video", "headers": _HEADERS}
    }

    @app.post(
        "/v1/purify",
        summary="Purify a video",
        description=f"`Accept: {LINES}` asks for lines of JSON instead: progress, votes as they come, both videos.",
        response_class=Response,
        openapi_extra={"requestBody": _FORM},
        responses={**answers, **_described(*_ERRORS)},
    )
    async def purify() -> Response:
        return PurifyAnswer(engine)

    pictures: dict[int | str, dict[str, Any]] = {
        200: {"content": {MOTION: {}}, "description": "Pictures, each in the place of the one before"},
        404: {"description": "No source of this name"},
    }

    @app.get(
        "/v1/live/{name}",
        summary="A live source, purified",
        response_class=Response,
        responses={**pictures, **_described(401, 403, 503)},
    )
    async def live(name: str) -> Response:
        if name not in engine.live:
            raise refusal(404, f"there is no such source; accepted: {', '.join(engine.live) or 'none, here'}")
        return LiveAnswer(engine, engine.live[name])


def _described(*statuses: int) -> dict[int | str, dict[str, Any]]:
    schema = {"type": "object", "required": ["detail"], "properties": {"detail": _STRING}}
    content = {"application/json": {"schema": schema}}
    return {status: {"description": _ERRORS[status], "content": content} for status in statuses}
