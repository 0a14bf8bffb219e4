"""Who may ask: names by which the service is called, pages that may call it, a token; and what every answer says."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from .limits import refusal

HEAD_BYTES = 2**14  # of the lines before a request's body, and of what comes behind a request before its answer
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
_LINGER = 2.0  # seconds for which what a refused client still sends is read: if it were not, the answer would be lost
_LEAST_TOKEN = 16  # characters
_LONGEST_PATH = 200  # characters of a path in the log
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:\d{1,5})?", re.IGNORECASE)
_HEADERS = {
    # The page plays videos that it was sent in an answer, which are blobs, and has an icon of its own.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; media-src blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
_logger = logging.getLogger("videopure_fast.service")


def new_token() -> str:
    """A token that nobody guesses."""
    return secrets.token_urlsafe(32)


def check_token(token: str) -> None:
    """ValueError for a token that is short, or that a header cannot carry."""
    if not re.fullmatch(rf"[\x21-\x7e]{{{_LEAST_TOKEN},}}", token):
        raise ValueError(f"the token cannot be used; accepted: {_LEAST_TOKEN} or more characters of ASCII, no blanks")


def check_hosts(hosts: Sequence[str]) -> None:
    """ValueError for what is no name of a host as requests state it, but for the port."""
    for host in hosts:
        match = _HOST.fullmatch(host)
        if match is None or match[2] is not None:
            raise ValueError(f"{host!r} is no name of a host; accepted: a name or a number, no port, IPv6 in brackets")


class Guard:
    """The outermost layer of the application (ASGI): it refuses, adds headers to answers, logs and counts.

    hosts: names of the service that requests may state, in lower case; None for any, where a token protects it. token:
    what requests must bring; None for none. free: paths for which it is not needed. observe: told the method, the path
    and the status of each request.

    The log has neither headers nor the part of an address after "?", which may have secrets.
    """

    def __init__(
        self,
        app: Any,
        *,
        hosts: Sequence[str] | None,
        token: str | None,
        free: Collection[str],
        observe: Callable[[str, str, int], None],
    ) -> None:
        self._app, self._hosts, self._free, self._observe = app, hosts, free, observe
        self._token = None if token is None else token.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # nothing here is one
        else:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        began = time.monotonic()
        exchange = _Exchange(Headers(scope=scope), receive, send)
        try:
            _check_head(scope)
            self._check(scope["path"], exchange.headers)
            await self._app(scope, exchange.receive, exchange.send)
        except HTTPException as error:
            await _refuse(error, scope, exchange)
        except Exception:
            _logger.exception("a request could not be answered")
            if exchange.status:
                raise
            await _refuse(refusal(500, "the service failed to answer; its log says why"), scope, exchange)
        finally:
            seconds = time.monotonic() - began
            self._observe(scope["method"], scope["path"], exchange.status)
            path = "".join(c if c.isprintable() else "?" for c in scope["path"][:_LONGEST_PATH])
            client = (scope.get("client") or ["-"])[0]
            _logger.info("%s %s %s %d %.3f s", client, scope["method"], path, exchange.status, seconds)

    def _check(self, path: str, headers: Headers) -> None:
        """HTTPException for a request that is not for this service, not from its page, or without its token."""
        host = headers.get("host", "")
        match = _HOST.fullmatch(host)
        if match is None or (self._hosts is not None and match[1].lower().rstrip(".") not in self._hosts):
            names = "its own name" if self._hosts is None else ", ".join(self._hosts)
            raise refusal(403, f"the request is for another host; accepted: {names}")
        origin = headers.get("origin")
        if origin is not None and not _is_of(origin, host):
            raise refusal(403, "the request comes from another page; accepted: this service's own, and programs")
        if path in self._free:
            return
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            raise refusal(403, "the request comes from another page; accepted: this service's own, and programs")
        if self._token is not None:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._token):
                error = refusal(401, "the service needs a token; accepted: the header `Authorization: Bearer TOKEN`")
                error.headers = {"WWW-Authenticate": "Bearer"}
                raise error


def _check_head(scope: Any) -> None:
    """431 for a head that is too long. The connection bounds only heads that come in several pieces."""
    lines = sum(len(name) + len(value) + len(": \r\n") for name, value in scope["headers"])
    if len(scope.get("raw_path") or b"") + len(scope["query_string"]) + lines > HEAD_BYTES:
        raise refusal(431, f"the request's head is too long; accepted: {HEAD_BYTES} bytes at most")


def _is_of(origin: str, host: str) -> bool:
    """Whether an origin, such as "http://localhost:8000", is that of the host that was asked."""
    with contextlib.suppress(ValueError):
        parts = urlsplit(origin)
        return parts.scheme in ("http", "https") and parts.netloc.lower() == host.lower()
    return False


async def _refuse(error: HTTPException, scope: Any, exchange: _Exchange) -> None:
    response = JSONResponse({"detail": error.detail}, error.status_code, error.headers)
    await response(scope, exchange.receive, exchange.send)


class _Exchange:
    """A request and its answer. One that is answered before it has come to its end is the last of its connection."""

    def __init__(self, headers: Headers, receive: Any, send: Any) -> None:
        self.headers = headers
        self.status = 0  # of an answer that has begun
        self._receive, self._send = receive, send
        self._complete = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers

    async def receive(self) -> Any:
        message = await self._receive()
        self._complete = self._complete or not message.get("more_body", False)
        return message

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
            if not self._complete:
                headers["connection"] = "close"
        elif not self._complete and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await self._drain()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)

    async def _drain(self) -> None:
        """Read and drop what still comes, for a while."""
        end = time.monotonic() + _LINGER
        with contextlib.suppress(asyncio.TimeoutError):
            while not self._complete:
                await asyncio.wait_for(self.receive(), max(0.0, end - time.monotonic()))
