"""Numbers about a service for Prometheus, in a registry of its own: several services in a process do not mix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from ..realtime.serving import Times
    from ..realtime.stream import Counts

# Paths by which requests are counted; others, which anybody may invent, are counted together.
_PATHS = ("/", "/healthz", "/readyz", "/metrics", "/v1/info", "/v1/purify")
_LIVE = "/v1/live/"
_METHODS = ("GET", "HEAD", "POST")
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Metrics:
    """What a service counts and measures."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        labels = ["method", "path", "status"]
        self._requests = Counter("videopure_requests", "Requests by their answer.", labels, registry=self._registry)
        self._stages = Histogram(
            "videopure_stage_seconds", "Seconds of a video.", ["stage"], buckets=_SECONDS, registry=self._registry
        )
        self.bytes = Counter("videopure_uploaded_bytes", "Bytes of videos received.", registry=self._registry)
        self.gone = Counter("videopure_clients_gone", "Clients that went away.", registry=self._registry)
        self.uploads = Gauge("videopure_uploads", "Uploads that come in now.", registry=self._registry)
        self.viewers = Gauge("videopure_viewers", "Viewers of live sources now.", registry=self._registry)

    def observe(self, method: str, path: str, status: int) -> None:
        """Count a request; status 0: its client went away before an answer began."""
        known = path if path in _PATHS else _LIVE if path.startswith(_LIVE) else "other"
        self._requests.labels(method if method in _METHODS else "other", known, str(status)).inc()

    def took(self, times: Mapping[str, float]) -> None:
        """The seconds of a video's stages."""
        for stage, seconds in times.items():
            self._stages.labels(stage).observe(seconds)

    def show(self, name: str, description: str, value: Callable[[], float]) -> None:
        """A number that is asked for whenever the metrics are."""
        Gauge(f"videopure_{name}", description, registry=self._registry).set_function(value)

    def show_clips(self, counts: Callable[[], Counts]) -> None:
        """Clips by what became of them, and now."""
        clips = Gauge("videopure_clips", "Windows of videos by outcome.", ["outcome"], registry=self._registry)
        for outcome in counts()._fields:
            clips.labels(outcome).set_function(lambda outcome=outcome: getattr(counts(), outcome))

    def text(self) -> bytes:
        """All numbers in Prometheus' format."""
        found: bytes = generate_latest(self._registry)
        return found


def stage_seconds(times: Times) -> dict[str, float]:
    """The seconds of a clip's stages, by the names that the service gives them."""
    return {
        "queue": times.started - times.submitted,
        "encode": times.encoded - times.started,
        "sample": times.sampled - times.encoded,
        "decode": times.decoded - times.sampled,
    }
