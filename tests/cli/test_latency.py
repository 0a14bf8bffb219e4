import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import build_purifier
from typer.testing import CliRunner

sys.path.append(str(Path(__file__).parents[1] / "realtime"))
from stub_servers import SleepingServer, service

from videopure_fast import cli
from videopure_fast.cli import latency
from videopure_fast.purifier import Purifier
from videopure_fast.realtime import study

SECONDS = 0.005  # of a clip


@pytest.fixture(autouse=True)
def stub(monkeypatch):
    """A stub in the place of the models; returns the settings that servers were built for."""
    built = []

    def build(setting):
        built.append(setting)
        return SleepingServer(service(SECONDS), setting)

    monkeypatch.setattr(Purifier, "from_pretrained", lambda name, **_: build_purifier(inversion_steps=2))
    monkeypatch.setattr(latency, "_builder", lambda *_: build)
    return built


def run(*arguments):
    return CliRunner().invoke(cli.app, ["latency", *map(str, arguments)])


def test_one_command_shows_how_latency_grows_with_the_load(tmp_path):
    file, plot, timeline = tmp_path / "study.json", tmp_path / "load.svg", tmp_path / "clips.png"
    result = run("--seconds", 0.6, "--json", file, "--plot", plot, "--timeline", timeline)
    assert result.exit_code == 0, result.output
    assert "Alone, a clip takes 0.005 s: at most 200 clips a second" in result.output
    assert "At 95% of that, half of the clips take more than" in result.output
    assert "A camera of 25 frames a second, a clip every 16 frames, takes 1% of this server" in result.output
    saved = study.load(file)
    assert [row["load"] for row in saved["rows"]] == [0.5, 0.8, 0.95]
    ages = [row["summary"]["queue_age"]["p95"] for row in saved["rows"]]
    assert ages == sorted(ages) and ages[0] < ages[-1]
    assert plot.read_text().count("p95, measured") == 1 and timeline.stat().st_size > 10_000


def test_tables_and_help_fit_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    options = ("--batch", "1,2", "--load", "50,200", "--queue", 1, "--policy", "reject", "--seconds", 0.5)
    result = run(*options)
    assert result.exit_code == 0 and "…" not in result.output, result.output
    for setting in ("one by one", "batches of 2"):
        assert f"{setting}, fifo, queue of 1, reject\n" in result.output
    assert "At 50% of that" in result.output
    shown = run("--help").output
    for line in latency.latency.__doc__.splitlines():
        assert "  " not in line.strip() or line.strip() in shown  # a line of a table or an example is not broken


def test_settings_are_compared_on_the_same_cameras(tmp_path, stub):
    file = tmp_path / "study.json"
    options = (
        "--cameras",
        300,
        "--queue",
        2,
        "--policy",
        "reject,drop-oldest",
        "--batch",
        "1,2",
        "--deadline",
        "0.5,1",
    )
    result = run(*options, "--seconds", 0.9, "--json", file)
    assert result.exit_code == 0, result.output
    rows = study.load(file)["rows"]
    assert [(row["setting"]["max_batch"], row["setting"]["policy"]) for row in rows] == [
        *((1, "reject"), (1, "drop-oldest")),
        *((2, "reject"), (2, "drop-oldest")),
    ]
    moments = [[(record.source, record.due) for record in study.read_records(row)] for row in rows]
    assert moments[0] == moments[1] == moments[2] == moments[3]
    record = study.read_records(rows[0])[0]
    assert record.deadline - record.due == pytest.approx((0.5, 1)[record.source % 2])
    assert rows[0]["load"] == pytest.approx(300 * 25 / 16 * SECONDS, rel=0.05)
    assert "refused" in result.output and "dropped" in result.output


def test_a_sweep_finds_the_highest_load(tmp_path):
    file = tmp_path / "study.json"
    result = run("--sweep", "--deadline", 0.015, "--seconds", 0.3, "--json", file)
    assert result.exit_code == 0, result.output
    loads = [row["load"] for row in study.load(file)["rows"]]
    assert loads == sorted(loads) and loads[-1] == 1.0 and len(loads) >= 4
    assert "has a p95 within 0.015 s" in result.output


def test_recorded_arrivals_are_offered(tmp_path):
    moments, file = tmp_path / "moments.json", tmp_path / "study.json"
    moments.write_text("[0.05, [0.1, 7], 0.02]")
    assert run("--arrivals", moments, "--json", file).exit_code == 0
    (row,) = study.load(file)["rows"]
    assert [(record.source, record.due) for record in study.read_records(row)] == [(0, 0.02), (0, 0.05), (7, 0.1)]


@pytest.mark.realtime
def test_scenarios_by_loadgen(tmp_path):
    pytest.importorskip("mlperf_loadgen")
    file = tmp_path / "study.json"
    names = "singlestream,multistream,server,offline"
    result = run("--scenario", names, "--seconds", 1, "--json", file)
    assert result.exit_code == 0, result.output
    found = study.load(file)["scenarios"]
    assert [one["scenario"] for one in found] == ["SingleStream", "MultiStream", "Server", "Offline"]
    assert "Runs of 1 s, and MLPerf's rules ask for 600: these are no MLPerf results" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        (("--load", "fifty"), "--load must be positive numbers, such as 1,4; got 'fifty'"),
        (("--load", "0"), "--load must be positive"),
        (("--batch", "1.5"), "--batch must be positive whole numbers"),
        (("--deadline", "-1"), "--deadline must be positive"),
        (("--deadline", "inf"), "--deadline must be positive"),
        (("--fps", "0"), "--fps must be more than 0"),
        (("--fps", "nan"), "--fps must be more than 0"),
        (("--policy", "drop"), "unknown policy 'drop'; accepted: block, reject, drop-oldest"),
        (("--order", "lifo"), "unknown order 'lifo'; accepted: fifo, edf"),
        (("--scenario", "Server"), "unknown scenario 'Server'; accepted: singlestream, multistream, server, offline"),
        (("--sweep",), "--sweep needs one --deadline"),
        (("--sweep", "--deadline", "1,2"), "--sweep needs one --deadline"),
        (("--arrivals", "/nowhere.json"), "there is no file /nowhere.json"),
        (("--cameras", "1", "--hop", "99", "--seconds", "1"), "hop must be 1 to 16"),
        (("--json", "/nowhere/study.json"), "there is no folder /nowhere"),
        (("--plot", "load.svg", "--arrivals", "moments.json"), "no file moments.json"),
        (("--timeline", "clips.svg", "--scenario", "server"), "LoadGen"),
        (("--plot", "a.svg", "--timeline", "./a.svg"), "cannot write a.svg: it is another FILE"),
        (("--arrivals", "a.json", "--json", "./a.json"), "cannot write a.json: it is another FILE"),
        (("--sweep", "--deadline", "1", "--cameras", "2"), "say what to offer; accepted: one of them"),
        (("--scenario", "server", "--batch", "1,2"), "--scenario is given 2 settings"),
        (("--plot", "load.jpg"), "accepted extensions are .svg, .png"),
    ],
)
def test_bad_options_are_refused(options, seen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*options)
    assert result.exit_code == 1 and seen in str(result.exception)


def test_an_interrupted_study_has_the_runs_before(tmp_path, monkeypatch):
    file, runs, whole = tmp_path / "study.json", [], study.run

    def interrupted(*arguments, **options):
        runs.append(whole(*arguments, **options))
        if len(runs) == 3:
            raise KeyboardInterrupt
        return runs[-1]

    monkeypatch.setattr(study, "run", interrupted)
    assert run("--seconds", 0.1, "--load", "50,80,95", "--json", file, "--plot", tmp_path / "a.svg").exit_code != 0
    assert [row["load"] for row in study.load(file)["rows"]] == [0.5, 0.8]
    assert [path.name for path in tmp_path.iterdir()] == ["study.json"]


@pytest.mark.realtime
def test_ctrl_c_leaves_whole_files(tmp_path):
    """In a later run: the study has the runs before it, and no partial file is left."""
    file = tmp_path / "study.json"
    code = f"""if True:
        import sys
        sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path]!r}
        import test_latency
        from videopure_fast import cli
        from videopure_fast.cli import latency
        from videopure_fast.purifier import Purifier
        Purifier.from_pretrained = lambda name, **_: test_latency.build_purifier(inversion_steps=2)
        latency._builder = lambda *_: lambda setting: test_latency.SleepingServer(test_latency.service(0.02), setting)
        loads = ["--seconds", "0.6", "--load", "50,80,50,80,50,80"]
        sys.argv = ["videopure-fast", "latency", *loads, "--json", {str(file)!r}]
        cli.main()"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        while not file.exists() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(0.2)
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode not in (0, 1), errors.decode()
    assert b"Traceback" not in errors
    saved = json.loads(file.read_text())
    assert 1 <= len(saved["rows"]) < 6 and saved["rows"][0]["summary"]["answered"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["study.json"]


def test_no_thread_is_left():
    before = threading.active_count()
    assert run("--seconds", 0.1, "--load", 50).exit_code == 0
    assert threading.active_count() == before
