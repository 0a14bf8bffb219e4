"""The service as deployments of Ray Serve: replicas of the application, and one replica for each live source.

Requests go to the replica with fewer of them. A live source is a deployment of its own with a single replica: whichever
replica a viewer asks, the source is opened once, and its clips stay in order on one device. Ray's own ways of keeping
requests together, by model id or by session, need headers that a browser does not send for a picture.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..ray_cluster import connected
from .limits import Limits
from .settings import Settings, load, make_app

if TYPE_CHECKING:
    from fastapi import FastAPI

    from .live import Frames

APPLICATION = "videopure"
_OTHERS = 8  # requests of a replica beside videos and viewers: of the page, of health, of metrics
_STORE = 2**28  # bytes of memory in which Ray keeps what goes from process to process
_WAITING = 32  # requests that wait for a replica at most; beyond them Ray answers 503 itself
_RETRY = 5.0  # seconds after which those may come again
# Ray's one proxy counts the requests of each replica. Where it forgets them after seconds without a request, as by
# default, those that come together next all go to the first replica that it has asked. A busy one may take longer than
# Ray's tenth of a second to say how many it has.
_ENVIRONMENT = {
    "RAY_SERVE_QUEUE_LENGTH_CACHE_TIMEOUT_S": "1000000000",
    "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "1",
}


def resources(actors: int, cores: float, gpus: float) -> dict[str, float]:
    """What each replica and each live source gets: a GPU or its share of those that there are, else of the cores."""
    share = cores / actors
    if gpus:
        return {"num_cpus": min(1.0, share), "num_gpus": min(1.0, gpus / actors)}
    return {"num_cpus": float(int(share)) if share >= 1 else share}


def ongoing(limits: Limits) -> int:
    """Requests that a replica is given at once: its own limits refuse, and say when to come again."""
    return limits.working + limits.waiting + limits.uploads + limits.viewers + _OTHERS


def longest(settings: Settings) -> float | None:
    """Seconds that Ray gives a request: as many as the bounds of its parts allow together.

    None where there are live sources, whose pictures come for as long as somebody looks.
    """
    if settings.sources:
        return None
    limits = settings.limits
    return limits.upload + limits.answer + limits.taking


def application(settings: Settings, replicas: int, options: dict[str, Any]) -> Any:
    """The application of Ray Serve. options: of each replica's actor, as `resources` gives them."""
    from ray import serve

    limits, names = settings.limits, tuple(settings.sources)
    live = [
        serve.deployment(
            _LiveSource,
            name=_deployment(name),
            num_replicas=1,
            max_ongoing_requests=limits.viewers + _OTHERS,
            ray_actor_options=options,
        ).bind(settings, name)
        for name in names
    ]

    def build() -> FastAPI:
        return _warm_first(make_app(settings, {name: _remote(name) for name in names}))

    return serve.deployment(
        serve.ingress(build)(),
        name="service",
        num_replicas=replicas,
        max_ongoing_requests=ongoing(limits),
        max_queued_requests=_WAITING,
        backpressure_config={"retry_after_s": _RETRY},
        graceful_shutdown_timeout_s=limits.drain,
        ray_actor_options=options,
    ).bind(*live)


def _warm_first(app: FastAPI) -> FastAPI:
    """Begin the application warm: Ray would choose a replica that refuses at once before those that are at work."""
    begin = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(begun: FastAPI) -> AsyncIterator[None]:
        async with begin(begun):
            await begun.state.engine.warmed()
            begun.state.engine.check_ready()
            yield

    app.router.lifespan_context = lifespan
    return app


def run(settings: Settings, *, host: str, port: int, replicas: int, announce: Callable[[str], None]) -> None:
    """Serve by a Ray of this machine, which is started for it, until SIGINT or SIGTERM.

    announce: told the address where requests are taken. ValueError where the service cannot listen,
    RuntimeError where Ray cannot begin.
    """
    from ray import serve

    from .server import address_of, listen

    with listen(host, port) as free:  # Ray says of a port that is taken that a process of its own has failed
        port, address = free.getsockname()[1], address_of(free)
    stopped = threading.Event()
    with connected(None, store=_STORE, environment=_ENVIRONMENT) as (machine,):
        http = {"host": host, "port": port, "request_timeout_s": longest(settings)}
        with _told():
            serve.start(proxy_location="HeadOnly", http_options=http)
        gpus = machine.get("GPU", 0.0) if settings.device in (None, "cuda") else 0.0
        options = resources(replicas + len(settings.sources), machine.get("CPU", 1.0), gpus)
        with _told():
            serve.run(application(settings, replicas, options), name=APPLICATION, route_prefix="/")
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for number in handlers:
                signal.signal(number, lambda *_: stopped.set())
            announce(address)
            stopped.wait()
            serve.shutdown()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """RuntimeError, in a line, where Ray cannot begin, as on a machine that is too busy."""
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"Ray could not start the service: {' '.join(str(error).split())}") from error


def _deployment(name: str) -> str:
    return f"live-{name}"


class _LiveSource:
    """The one replica that reads a source; `view` gives its pictures to replicas of the service."""

    def __init__(self, settings: Settings, name: str) -> None:
        from ..realtime.stream import StreamPurifier
        from .live import CLIPS_WAITING, source_frames

        purifier, _ = load(replace(settings, classifier=None))
        stream = StreamPurifier(purifier, max_batch=1, queue_size=CLIPS_WAITING, policy="reject")
        window, overlap = purifier.max_frames, purifier.config.window_overlap
        self._frames = source_frames(settings.sources[name], stream, window=window, overlap=overlap, size=settings.size)

    async def view(self) -> AsyncIterator[bytes]:
        async with contextlib.aclosing(self._frames.view()) as pictures:  # type: ignore[type-var]
            async for picture in pictures:
                yield picture


def _remote(name: str) -> Frames:
    """The pictures of a source that another deployment reads, shared by this replica's viewers."""
    from .live import Frames

    return Frames(partial(_remote_pictures, name))


async def _remote_pictures(name: str) -> AsyncIterator[bytes]:
    from ray import serve

    handle = serve.get_deployment_handle(_deployment(name), APPLICATION)
    pictures = handle.options(stream=True).view.remote()
    try:
        async for picture in pictures:
            yield picture
    except Exception as error:  # Ray's own have the whole trace of the other replica
        raise OSError(str(getattr(error, "cause", "its replica has failed"))) from error
    finally:
        pictures.cancel()
