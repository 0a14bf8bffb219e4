"""LoadGen over stub servers, and the open-loop generator held against LoadGen's Server scenario."""

from __future__ import annotations

import builtins
import signal
import threading
import time
from concurrent.futures import Future

import pytest
from stub_servers import CLIPS, SleepingServer, service

from videopure_fast.realtime.arrivals import Arrival, poisson
from videopure_fast.realtime.load import offer
from videopure_fast.realtime.loadgen import SCENARIOS, Plan, run_scenario
from videopure_fast.realtime.study import Setting, summarize

SECONDS = 0.01  # of a clip


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def run(plan, *, setting=Setting(queue_size=10_000), times=None, **options):  # noqa: B008  (immutable)
    pytest.importorskip("mlperf_loadgen")
    with SleepingServer(times or service(SECONDS), setting) as server:
        return run_scenario(server, CLIPS, plan, **options)


@pytest.mark.realtime
def test_single_stream_is_the_time_of_a_clip():
    found = run(Plan("SingleStream", 2, SECONDS))
    assert found["latency"]["p50"] == pytest.approx(SECONDS, rel=0.15)
    assert 100 < found["clips"] <= 201
    assert found["clips_per_second"] == pytest.approx(1 / SECONDS, rel=0.15)


@pytest.mark.realtime
def test_multi_stream_is_the_time_of_a_query():
    one_by_one = run(Plan("MultiStream", 2, SECONDS, samples=4))
    curve = {1: 1, 2: 4 / 3, 4: 2}
    together = run(Plan("MultiStream", 2, SECONDS, samples=4), setting=Setting(4), times=service(SECONDS, curve=curve))
    assert one_by_one["latency"]["p50"] == pytest.approx(4 * SECONDS, rel=0.15)
    assert together["latency"]["p50"] < 0.8 * one_by_one["latency"]["p50"]
    assert one_by_one["clips_per_second"] == pytest.approx(1 / SECONDS, rel=0.15)


@pytest.mark.realtime
def test_offline_is_throughput():
    counted = []
    found = run(Plan("Offline", 2, SECONDS), progress=lambda: counted.append(None))
    assert found["clips_per_second"] == pytest.approx(1 / SECONDS, rel=0.1)
    assert found["clips"] == len(counted) >= 200


@pytest.mark.realtime
def test_the_open_loop_generator_sees_what_loadgens_server_sees():
    """At the same rate, and once more on the very moments at which LoadGen asked."""
    load, seconds = 0.5, 0.01
    moments = []

    class Noting(SleepingServer):
        def submit(self, clip, **options):
            moments.append(time.monotonic())
            return super().submit(clip, **options)

    pytest.importorskip("mlperf_loadgen")
    with Noting(service(seconds)) as server:
        plan = Plan("Server", 40, seconds, rate=load / seconds, deadline=10 * seconds, seed=3)
        theirs = run_scenario(server, CLIPS, plan)
    replayed = [Arrival(moment - moments[0]) for moment in moments]
    with SleepingServer(service(seconds)) as server:
        same = summarize(offer(server, CLIPS, replayed))["latency"]
    with SleepingServer(service(seconds)) as server:
        run = summarize(offer(server, CLIPS, poisson(load / seconds, seconds=40, seed=3)))
    ours = run["latency"]
    print(f"LoadGen {theirs['latency']}, replayed {same}, ours {ours}, of it the generator's own lag {run['lag']}")
    assert theirs["clips"] == len(moments) > 1000
    for name in ("mean", "p50", "p90", "p95"):
        assert same[name] == pytest.approx(theirs["latency"][name], rel=0.05)
        assert ours[name] == pytest.approx(theirs["latency"][name], rel=0.15)


@pytest.mark.realtime
def test_a_short_run_says_so():
    found = run(Plan("Server", 1, SECONDS, rate=20, deadline=1.0))
    assert found["shorter_than_mlperf"] and found["mlperf_seconds"] == 600
    assert not found["valid"]  # too few queries for its 99th percentile


@pytest.mark.realtime
def test_failures_are_reported():
    class Failing:
        def submit(self, clip):
            future = Future()
            future.set_exception(ArithmeticError("not finite"))
            return future

    pytest.importorskip("mlperf_loadgen")
    with pytest.raises(RuntimeError, match=r"clips failed under LoadGen; the first: ArithmeticError\('not finite'\)"):
        run_scenario(Failing(), CLIPS, Plan("SingleStream", 0.1, SECONDS))


@pytest.mark.realtime
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_an_interruption_ends_the_run(scenario):
    started = time.monotonic()
    main = threading.main_thread().ident
    timer = threading.Timer(0.5, lambda: signal.pthread_kill(main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        run(Plan(scenario, 3, SECONDS, rate=50))
    timer.join()
    assert time.monotonic() - started < 6


@pytest.mark.parametrize(
    "plan",
    [
        Plan("Serve", 1, 1),
        Plan("Server", 0, 1),
        Plan("Server", 1, 0),
        Plan("Server", 1, 1, rate=-1),
        Plan("Server", 1, 1, samples=0),
        Plan("Server", 1, 1, seed=-1),
    ],
)
def test_bad_plans_are_refused(plan):
    with pytest.raises(ValueError, match="accepted|must be"):
        run_scenario(None, CLIPS, plan)


def test_what_is_missing_is_named(monkeypatch):
    find = builtins.__import__

    def without(name, *arguments, **options):
        if name == "mlperf_loadgen":
            raise ImportError(name)
        return find(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"need LoadGen: pip install 'videopure-fast\[latency\]'"):
        run_scenario(None, CLIPS, Plan("Server", 1, 1))
