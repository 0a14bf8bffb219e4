"""The command `serve`: the purifier behind HTTP, for other programs and for a browser."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import console
from .options import Device, Dtype, Flow, Model, Size, Steps, default_size

if TYPE_CHECKING:
    from ..service.settings import Settings

TOKEN = "VIDEOPURE_FAST_TOKEN"  # variable of the environment
_NEEDED = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")


def serve(
    host: Annotated[str, typer.Option(help="Where to listen: a name or a number of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 for a free one.")] = 8000,
    classifier: Annotated[
        str | None,
        typer.Option(help='"tiny", or "package.module:function" returning a module: its votes and label.'),
    ] = None,
    model: Model = "tiny",
    size: Size = None,
    source: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SOURCE|@FILE",
            help="A live source, seen at /v1/live/NAME: what `watch` reads. @FILE: such pairs, a line each, which "
            "other users of the machine do not see in its list of processes.",
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            show_default="the names of localhost; elsewhere any",
            help="Another name by which it is called, without the port; repeat.",
        ),
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help=f"File with the token that callers need; or set {TOKEN}.")
    ] = None,
    max_megabytes: Annotated[float, typer.Option(help="Size of a video at most, in 10^6 bytes.")] = 64.0,
    max_seconds: Annotated[float, typer.Option(help="Length of a video at most.")] = 60.0,
    max_frames: Annotated[int, typer.Option(min=2, help="Frames of a video at most.")] = 256,
    waiting: Annotated[int, typer.Option("--queue", min=0, help="Videos that wait at most; others get a 503.")] = 8,
    replicas: Annotated[
        int, typer.Option(min=1, help="Replicas by Ray Serve, each with a GPU or its share of the cores.")
    ] = 1,
    steps: Steps = None,
    device: Device = None,
    dtype: Dtype = None,
    flow: Flow = None,
) -> None:
    """Serve the purifier by HTTP: a page for the browser, and addresses for programs.

    POST /v1/purify takes a video as the field `video` of a form, and answers with the purified mp4; with a classifier
    the headers X-Label and X-Votes have its label. With `Accept: application/x-ndjson` it answers with lines of JSON
    while it computes. /v1/live/NAME shows a live source, /v1/info the limits, /openapi.json everything.

    Who may call: by default this machine alone. Where --host is reached from elsewhere, callers need a token, by the
    header `Authorization: Bearer TOKEN`; without --token-file and the variable VIDEOPURE_FAST_TOKEN one is made and
    shown. The service speaks plain HTTP: in a network that you do not trust put a server with TLS before it.

    What exceeds a limit is refused by a sentence. A busy service answers 503, and says when to try again. Uploads are
    deleted when they are answered; nothing is kept.

    With --replicas it is Ray that listens: slow heads of requests, and bodies that wait for a replica, are then not
    bounded by this command, but by a server with TLS that you put before it.

    Ctrl-C, or SIGTERM, finishes what is in flight within half a minute, then cancels it.

    Examples:

    ```
    videopure-fast serve --classifier tiny
    videopure-fast serve --source door=rtsp://camera/live --max-seconds 20
    videopure-fast serve --host 0.0.0.0 --token-file token.txt --model ali-vilab/text-to-video-ms-1.7b
    videopure-fast serve --replicas 8 --model ali-vilab/text-to-video-ms-1.7b
    curl --fail --retry 9 -F video=@clip.mp4 http://127.0.0.1:8000/v1/purify -o purified.mp4
    ```
    """
    _check_surroundings(replicas)
    from ..inputs import check_number
    from ..service.limits import Limits, check_limits
    from ..service.security import LOCAL_HOSTS, check_hosts
    from ..service.server import is_local, names_of
    from ..service.settings import Settings

    check_number("--max-megabytes", max_megabytes, zero=False)
    usual = Limits(working=1) if replicas > 1 else Limits()
    limits = usual._replace(
        bytes=round(max_megabytes * 10**6), seconds=float(max_seconds), frames=max_frames, waiting=waiting
    )
    check_limits(limits)
    local = is_local(host)
    hosts: tuple[str, ...] | None = None
    if local or allow_host:
        hosts = tuple(dict.fromkeys([*(LOCAL_HOSTS if local else ()), *names_of(host), *(allow_host or ())]))
        check_hosts(hosts)
    token, made = _token(token_file, local)
    settings = Settings(
        model=model,
        size=default_size(model, size),
        limits=limits,
        classifier=classifier,
        device=device,
        dtype=dtype,
        flow=flow,
        steps=steps,
        sources=_sources(source or []),
        token=token,
        hosts=hosts,
        folder=os.getcwd(),
    )
    _serve(settings, host, port, replicas, made)


def _serve(settings: Settings, host: str, port: int, replicas: int, made: bool) -> None:
    def announce(address: str) -> None:
        console.print(f"Serving at {address}; Ctrl-C ends it.")
        if settings.token is not None:
            console.print(f"Callers need the token {settings.token}" if made else "Callers need the token.")

    if replicas > 1:
        from ..service import ray_serve

        console.print(f"Starting {replicas} replicas; each loads the model.")
        ray_serve.run(settings, host=host, port=port, replicas=replicas, announce=announce)
        console.print("Ended.")
        return
    from ..service.server import address_of, listen, log_to_stderr, serve
    from ..service.settings import make_app

    listener = listen(host, port)  # before a model is loaded
    app = make_app(settings)
    log_to_stderr()
    serve(app, listener, lambda: announce(address_of(listener)))
    console.print("Ended.")


def _check_surroundings(replicas: int) -> None:
    """ImportError, with the way to get what is missing; ValueError where Ray would be somebody's cluster."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ImportError(f"serve needs {', '.join(missing)}, not installed here; pip install 'videopure-fast[serve]'")
    if replicas == 1:
        return
    if find_spec("ray") is None:
        raise ImportError("--replicas needs Ray Serve, which is not installed here; pip install 'ray[serve]>=2.60'")
    if cluster := os.environ.get("RAY_ADDRESS"):
        own = "unset it, or run service.app.create_app in a deployment of your own"
        raise ValueError(f"--replicas starts a Ray of its own, but RAY_ADDRESS is {cluster}; accepted: {own}")


def _token(file: Path | None, local: bool) -> tuple[str | None, bool]:
    """The token, and whether it was made here. It leaves the environment, which other processes inherit."""
    from ..service.security import check_token, new_token

    given = os.environ.pop(TOKEN, None)
    if file is not None:
        try:
            given = file.read_text().strip()
        except (OSError, ValueError) as error:
            raise ValueError(f"the token cannot be read from {file}: {getattr(error, 'strerror', error)}") from error
    if given is None:
        return (None, False) if local else (new_token(), True)
    check_token(given)
    return given, False


def _sources(pairs: list[str]) -> dict[str, Any]:
    """Sources by name, checked."""
    from ..realtime.cameras import listed_sources, source_name
    from ..service.live import check_sources

    sources: dict[str, Any] = {}
    for line in listed_sources(pairs):
        name, equals, address = line.partition("=")
        if not equals or name in sources:
            seen = "is given twice" if equals else "has no address"
            raise ValueError(f"the source {source_name(name)} {seen}; accepted: NAME=SOURCE, each name once")
        sources[name] = address
    check_sources(sources)
    return sources
