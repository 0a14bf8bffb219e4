"""The study of latency: what its page needs of each run is there, and is that run's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from videopure_fast.realtime.arrivals import poisson
from videopure_fast.realtime.study import Setting

ROOT = Path(__file__).resolve().parents[2]


def test_each_run_has_the_drift_of_its_own(monkeypatch):
    """A clip takes 10 ms before and after the first run, and 12 ms after the second."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    monkeypatch.syspath_prepend(ROOT / "tests" / "realtime")
    import latency
    import latency_page
    from stub_servers import CLIPS, SleepingServer, service

    times, measured, run = iter([0.01, 0.01, 0.01, 0.012]), [], latency.study.run

    def kept(*arguments, **options):
        measured.append(run(*arguments, **options))
        return measured[-1]

    monkeypatch.setattr(latency.study, "run", kept)
    monkeypatch.setattr(latency, "simulate", lambda *_, **__: latency.study.read_records(measured[-1]))
    study = object.__new__(latency.Study)
    study.clips, study.result = CLIPS, {"rows": []}
    study.measure = lambda: service(next(times))
    study.build = lambda setting: SleepingServer(service(0.01), setting)
    study.add("load", poisson(50, seconds=0.4, seed=1), [Setting(1), Setting(4)], load=0.5)
    rows = study.result["rows"]
    assert [row["simulated"] for row in rows] == [False, True, False, True]
    assert [row.get("drift") for row in rows] == [pytest.approx(0), None, pytest.approx(0.2), None]
    first, second = (line for line in latency_page.agreement(rows) if line.startswith("| 50%"))
    assert first.endswith("| +0% | yes |") and second.endswith("| +20% | yes |")
