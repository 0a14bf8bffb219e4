"""MLPerf's four scenarios, run by MLCommons' own LoadGen, so that their figures mean what readers take them to mean.

LoadGen decides when it asks, and its figures are read from its log. A run is as long as one says, shorter than MLPerf's
rules ask for, and its result says so.
"""

from __future__ import annotations

import functools
import json
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from ..inputs import check_count, check_number
from .serving import Answer, ClipServer

Scenario = Literal["SingleStream", "MultiStream", "Server", "Offline"]
SCENARIOS: dict[Scenario, str] = {
    "SingleStream": "one clip at a time, the next when the last is answered",
    "MultiStream": "a few clips at a time, the next few when all of them are answered",
    "Server": "clips at random moments, whether or not earlier ones are answered",
    "Offline": "all clips at once",
}
MLPERF_SECONDS = 600  # that MLPerf's rules ask of a run
_MISSING = "MLPerf's scenarios need LoadGen: pip install 'videopure-fast[latency]'"
_POLL_SECONDS = 0.1  # between two looks at Ctrl-C
_PERCENTS = (50, 90, 95, 99)
_NANOSECONDS = 1e9


class Plan(NamedTuple):
    """What a run asks LoadGen for.

    seconds: the least that the run takes. clip_seconds: what a clip takes about, by which LoadGen plans. rate: clips a
    second of Server. deadline: seconds for the 99th percentile of Server. samples: clips of a query of MultiStream.
    """

    scenario: Scenario
    seconds: float
    clip_seconds: float
    rate: float = 1.0
    deadline: float = 1.0
    samples: int = 4
    seed: int = 0


def run_scenario(
    server: ClipServer, clips: Sequence[Tensor], plan: Plan, *, progress: Callable[[], None] | None = None
) -> dict[str, Any]:
    """Let LoadGen run one scenario over the server, and return its figures; latencies are in seconds.

    progress: called as each clip is answered. valid: LoadGen's own verdict, which also asks for enough queries.
    RuntimeError if a clip fails. Ctrl-C ends the run when LoadGen has gone through what is left of its schedule, whose
    clips are no longer computed.
    """
    _check(plan)
    loadgen = import_loadgen()
    system = _System(loadgen, server, clips, progress or (lambda: None))
    with tempfile.TemporaryDirectory() as folder:
        output = loadgen.LogOutputSettings()
        output.outdir, output.copy_summary_to_stdout = folder, False
        logs = loadgen.LogSettings()
        logs.log_output, logs.enable_trace = output, False
        under_test = loadgen.ConstructSUT(system.ask, lambda: None)
        library = loadgen.ConstructQSL(len(clips), len(clips), lambda _: None, lambda _: None)
        try:
            settings = _settings(loadgen, plan)
            system.run(lambda: loadgen.StartTestWithLogSettings(under_test, library, settings, logs))
        finally:
            loadgen.DestroyQSL(library)
            loadgen.DestroySUT(under_test)
        if system.errors:
            raise RuntimeError(f"{len(system.errors)} clips failed under LoadGen; the first: {system.errors[0]!r}")
        return _figures(plan, _read_log(Path(folder)))


class _System:
    """The server as LoadGen sees it: asked for samples by LoadGen's thread, it says when each has been answered."""

    def __init__(self, loadgen: Any, server: ClipServer, clips: Sequence[Tensor], progress: Callable[[], None]) -> None:
        self._loadgen, self._server, self._clips, self._progress = loadgen, server, clips, progress
        self._stopped = threading.Event()
        self._futures: set[Future[Answer]] = set()
        self.errors: list[BaseException] = []

    def ask(self, samples: Sequence[Any]) -> None:
        """Submit the clips of a query."""
        for sample in samples:
            identity = sample.id  # LoadGen's own sample is gone when this call has returned
            future: Future[Answer] = Future()
            if self._stopped.is_set():
                future.cancel()
            else:
                try:
                    future = self._server.submit(self._clips[sample.index])
                except Exception as error:
                    future.set_exception(error)
            self._futures.add(future)
            future.add_done_callback(functools.partial(self._complete, identity))

    def _complete(self, identity: int, future: Future[Answer]) -> None:
        """Tell LoadGen, which knows no failures; those are kept here."""
        self._futures.discard(future)
        try:
            error = future.exception()
        except CancelledError as canceled:
            error = canceled
        if error is not None and not self._stopped.is_set():
            self.errors.append(error)
        self._loadgen.QuerySamplesComplete([self._loadgen.QuerySampleResponse(identity, 0, 0)])
        self._progress()

    def run(self, test: Callable[[], None]) -> None:
        """Run LoadGen in a thread. It cannot be interrupted: what it still asks for after Ctrl-C is not computed."""
        ended = threading.Event()  # rather than join, which takes a thread for ended when Ctrl-C interrupts it

        def run_and_tell() -> None:
            try:
                test()
            finally:
                ended.set()

        thread = threading.Thread(target=run_and_tell, name="loadgen")
        thread.start()
        try:
            while not ended.wait(_POLL_SECONDS):
                pass
        except BaseException:
            self._stopped.set()
            for future in list(self._futures):
                future.cancel()
            ended.wait()
            raise
        finally:
            thread.join()


def import_loadgen() -> Any:
    """LoadGen's module. ImportError that says how to install it."""
    try:
        import mlperf_loadgen
    except ImportError as error:
        raise ImportError(_MISSING) from error
    return mlperf_loadgen


def _check(plan: Plan) -> None:
    if plan.scenario not in SCENARIOS:
        raise ValueError(f"scenario is {plan.scenario!r}; accepted: {', '.join(SCENARIOS)}")
    for name in ("seconds", "clip_seconds", "rate", "deadline"):
        check_number(name, getattr(plan, name), zero=False)
    check_count("samples", plan.samples)
    check_count("seed", plan.seed, least=0)


def _settings(loadgen: Any, plan: Plan) -> Any:
    """LoadGen's settings. It plans as many queries as twice the expected speed would need, and ends by the time."""
    settings = loadgen.TestSettings()
    settings.scenario = getattr(loadgen.TestScenario, plan.scenario)
    settings.mode = loadgen.TestMode.PerformanceOnly
    settings.min_duration_ms, settings.min_query_count = int(1000 * plan.seconds), 1
    settings.qsl_rng_seed = settings.sample_index_rng_seed = settings.schedule_rng_seed = plan.seed
    expected = int(plan.clip_seconds * _NANOSECONDS / 2)
    settings.single_stream_expected_latency_ns = expected
    settings.multi_stream_expected_latency_ns = expected * plan.samples
    settings.multi_stream_samples_per_query = plan.samples
    settings.server_target_qps = plan.rate
    settings.server_target_latency_ns = int(plan.deadline * _NANOSECONDS)
    settings.offline_expected_qps = 1 / plan.clip_seconds
    return settings


def _read_log(folder: Path) -> dict[str, Any]:
    """LoadGen's detailed log: a line of JSON for each value, after a mark."""
    found = {}
    for line in (folder / "mlperf_log_detail.txt").read_text().splitlines():
        mark, _, text = line.partition(" ")
        if mark == ":::MLLOG":
            entry = json.loads(text)
            found[entry["key"]] = entry["value"]
    return found


def _figures(plan: Plan, log: dict[str, Any]) -> dict[str, Any]:
    """The latency is that of a query: of all its clips in MultiStream, and of one clip elsewhere."""
    query, percentile = ("_query", "_per_query") if plan.scenario == "MultiStream" else ("", "")
    names = {f"p{percent}": f"result_{percent}.00_percentile{percentile}_latency_ns" for percent in _PERCENTS}
    names |= {"mean": f"result_mean{query}_latency_ns", "max": f"result_max{query}_latency_ns"}
    latency = {name: log[key] / _NANOSECONDS for name, key in names.items()}
    streamed = log["generated_samples_per_query"] / latency["mean"]
    return {
        **plan._asdict(),
        "clips": log["result_query_count"] * log["generated_samples_per_query"],
        "clips_per_second": log.get("result_samples_per_second", log.get("result_completed_samples_per_sec", streamed)),
        "latency": latency,
        "valid": log["result_validity"] == "VALID",
        "shorter_than_mlperf": plan.seconds < MLPERF_SECONDS,
        "mlperf_seconds": MLPERF_SECONDS,
    }
