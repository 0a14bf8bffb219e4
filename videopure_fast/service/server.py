"""The service in this process: uvicorn, with bounds that it lacks on slow, idle and greedy connections, and an end that
lets what is in flight be finished."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import socket
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from .limits import Limits
from .security import HEAD_BYTES

_KEEP_ALIVE = 5  # seconds for which a connection waits for another request
_BACKLOG = 128  # connections that the system holds


def _addresses(host: str) -> list[str]:
    """The numbers of a host, given as a name or a number. ValueError for what is none."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(f"the host {host!r} is not known here ({error.strerror})") from error
    return [str(entry[4][0]).partition("%")[0] for entry in found]


def is_local(host: str) -> bool:
    """Whether only this machine reaches an address, given as a name or a number. ValueError for what is none."""
    return all(ipaddress.ip_address(address).is_loopback for address in _addresses(host))


def names_of(host: str) -> list[str]:
    """A host, given as a name or a number, and its numbers, as requests state them."""
    return [f"[{name}]" if ":" in name else name for name in (host.partition("%")[0], *_addresses(host))]


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address, which tells the port if `port` is 0. ValueError where that cannot be."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"cannot listen at {host}, port {port}: {reason}") from error


def address_of(listener: socket.socket) -> str:
    """Where a browser finds what listens."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Serves an application of `create_app` at a socket until SIGINT or SIGTERM, or until `should_exit` is set.

    Then it takes nothing new, and lets what is in flight be finished within `limits.drain` seconds; a second SIGINT
    cancels that too.
    """

    def __init__(self, app: FastAPI) -> None:
        self._engine = app.state.engine
        limits: Limits = self._engine.limits
        super().__init__(
            uvicorn.Config(
                app,
                http=type("Connection", (Connection,), {"limits": limits}),
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_config=None,
                log_level="error",  # of uvicorn: what clients do wrong is none
                access_log=False,  # it has what follows "?" in an address, which may be a secret
                server_header=False,
                proxy_headers=False,
                backlog=_BACKLOG,
                timeout_keep_alive=_KEEP_ALIVE,
                timeout_graceful_shutdown=limits.drain,
                h11_max_incomplete_event_size=HEAD_BYTES,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """RuntimeError where the application cannot begin, in the place of a trace and an end of the whole program."""
        logger = logging.getLogger("uvicorn.error")
        logger.disabled = True
        try:
            await super().startup(sockets)
        except SystemExit:
            pass
        finally:
            logger.disabled = False
        if not self.started:
            failure = self._engine.failure
            raise RuntimeError(f"the service cannot begin: {failure}") from failure

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._engine.closing.set()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            yield
            self._captured_signals.clear()  # else they would be raised again: this end is what they ask for


class Connection(H11Protocol):
    """A connection of uvicorn's that does not wait for ever.

    It is cut where a request's head is not there in time, and where the client does not take what waits for it; where
    there are too many, it is told so. A client that sends more behind its request than the head of another one is cut,
    and until then it is read, or its going away would not be noticed.
    """

    limits: Limits

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._head: asyncio.TimerHandle | None = None
        self._taking: asyncio.TimerHandle | None = None
        if len(self.connections) > self.limits.connections:
            self._say(503, "the service has too many connections; try again later", b"Retry-After: 5\r\n")
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head, self._taking):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._await_head()
            return
        if self._head is not None:
            self._head.cancel()
            self._head = None
        if not self.cycle.more_body:
            if len(self.conn.trailing_data[0]) > HEAD_BYTES:
                self.transport.abort()
            else:
                self.flow.resume_reading()

    def _await_head(self) -> None:
        if self._head is None:
            self._head = self.loop.call_later(self.limits.head, self._cut_head)

    def _cut_head(self) -> None:
        self._head = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._taking is None:
            self._taking = self.loop.call_later(self.limits.taking, self.transport.abort)

    def resume_writing(self) -> None:
        if self._taking is not None:
            self._taking.cancel()
            self._taking = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()  # in the midst of another answer
        else:
            self._say(400, f"{msg.rstrip('.')}; accepted: HTTP/1.1, with a head of {HEAD_BYTES} bytes at most", b"")

    def _say(self, status: int, sentence: str, headers: bytes) -> None:
        """Answer without a request, and close."""
        body = json.dumps({"detail": sentence}).encode()
        phrase = HTTPStatus(status).phrase.encode()
        head = b"HTTP/1.1 %d %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n"
        self.transport.write(head % (status, phrase, len(body)) + headers + b"\r\n" + body)
        self.transport.close()


def serve(app: FastAPI, listener: socket.socket, announce: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM. RuntimeError where the service cannot begin.

    announce: called when requests are taken, which is before the service is warm.
    """
    server = Server(app)

    async def run() -> None:
        serving = asyncio.ensure_future(server.serve([listener]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.05)
        if server.started:
            announce()
        await serving

    with listener:
        asyncio.run(run())


def log_to_stderr() -> None:
    """A line for each request, and what goes wrong."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger("videopure_fast.service")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # it tells of each damaged form
