import json
import os
import signal
import threading
import time

import av
import pytest
import torch
from conftest import build_purifier, run_main
from realtime_fakes import FakeCamera, RtspRelay, StubServer, sends, video_bytes
from typer.testing import CliRunner

from videopure_fast import cli, purifier, tiny
from videopure_fast.cli import watch as cli_watch
from videopure_fast.data.picture import IDENTITY, upright
from videopure_fast.data.video import probe
from videopure_fast.realtime import cameras, live
from videopure_fast.streaming import purify_stream


def run(*arguments):
    return CliRunner().invoke(cli.app, ["watch", *map(str, arguments)])


@pytest.fixture
def servers(monkeypatch):
    """Stubs in place of the model and its server; returns what servers were asked for, and these."""
    asked = []

    def make(purifier, classifier, policy, waiting, **options):
        server = StubServer(policy=policy, size=waiting, labels=classifier is not None, **options)
        asked.append({"classifier": classifier, "policy": policy, "waiting": waiting, "server": server})
        return server

    monkeypatch.setattr(cli_watch, "_server", make)
    monkeypatch.setattr(purifier.Purifier, "from_pretrained", lambda name, **options: build_purifier())
    monkeypatch.setattr(cameras, "_FIRST_WAIT", 0.02)
    return asked


def video(path, count=20, step=10, **size):
    path.write_bytes(video_bytes(count, step=step, kind="matroska", **size))
    return path


def lines(path):
    content = path.read_text()
    assert content.endswith("\n")
    return [json.loads(line) for line in content.splitlines()]


def interrupt_when(condition, number=signal.SIGINT, limit=8.0):
    """Send this process a signal when a condition holds, as Ctrl-C would."""

    def wait():
        end = time.monotonic() + limit
        while not condition() and time.monotonic() < end:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=wait, daemon=True).start()


def test_files_are_watched_to_their_end(tmp_path, servers):
    sources = [video(tmp_path / "a.mkv"), video(tmp_path / "b.mkv", 14, height=48, width=32)]
    outputs = [tmp_path / "a.mp4", tmp_path / "b.ts"]
    record, listed = tmp_path / "seen.jsonl", tmp_path / "cameras.txt"
    listed.write_text(f"{sources[1]}\n")
    result = run(
        *(sources[0], f"@{listed}"),
        *("-o", outputs[0], "-o", outputs[1], "--record", record, "--size", 16),
        "--classifier",
        "tiny",
        "--policy",
        "block",
    )
    assert result.exit_code == 0, result.output
    assert [probe(path).frames for path in outputs] == [20, 14]
    assert (probe(outputs[0]).height, probe(outputs[0]).width) == (16, 24) and probe(outputs[1]).height == 24
    assert f"{sources[0]}: state ended, frames in 20, dropped 0, damaged 0, clips 3, refused 0, label " in result.output
    assert f"{outputs[1]}: 14 purified frames, 0 dropped." in result.output
    assert servers[0]["policy"] == "block" and servers[0]["waiting"] == 4
    start, *others = lines(record)
    assert start["event"] == "start" and start["cameras"] == list(map(str, sources))
    assert (start["window"], start["hop"], start["policy"], start["classifier"]) == (8, 6, "block", "tiny")
    assert (start["device"], start["dtype"], start["queue"], start["flow"]) == ("cpu", "float32", 4, None)
    assert {"steps", "size", "deadline", "timeout"} <= start.keys()
    assert sum(line["event"] == "clip" for line in others) == 5 and {line["camera"] for line in others} == {1, 2}
    assert sum(line["event"] == "end" for line in others) == 2


def test_the_purifier_and_its_classifier_do_the_work(tmp_path, monkeypatch):
    """What goes to the output is what `purify_stream` gives, bit for bit."""
    model, source, output = build_purifier(), video(tmp_path / "a.mkv", 20, noise=True), tmp_path / "out.mp4"
    written, write = [], live.LiveOutput.write
    monkeypatch.setattr(purifier.Purifier, "from_pretrained", lambda name, **options: model)
    monkeypatch.setattr(live.LiveOutput, "write", lambda self, frames: written.extend(frames) or write(self, frames))
    record, options = tmp_path / "seen.jsonl", ("--policy", "block", "--size", 32, "--classifier", "tiny")
    result = run(source, "-o", output, "--record", record, *options)
    assert result.exit_code == 0, result.output
    frames = [upright(frame, IDENTITY, (32, 48)) for frame in decoded(source)]
    expected = list(purify_stream(model, frames, 20))
    assert probe(output).frames == len(written) == 20
    assert all(torch.equal(frame, other) for (frame, _), other in zip(written, expected, strict=True))
    clips = [line for line in lines(record) if line["event"] == "clip"]
    assert [line["first"] for line in clips] == [0, 6, 12] and {line["outcome"] for line in clips} == {"purified"}
    assert {line["class"] for line in clips} <= {*tiny.CLASSES}


def decoded(path):
    with av.open(str(path)) as container:
        yield from container.decode(video=0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_files_whole(tmp_path, servers, monkeypatch, capsys, number):
    source, output, record = video(tmp_path / "a.mkv", 600), tmp_path / "out.mp4", tmp_path / "seen.jsonl"
    interrupt_when(lambda: record.exists() and record.read_text().count('"clip"') > 4, number)
    status, shown, errors = run_main(
        monkeypatch, capsys, "watch", source, "-o", output, "--record", record, "--size", 16, "--window", 4
    )
    assert status == (0 if number == signal.SIGINT else 143) and not errors
    found = lines(record)
    (ended,) = (line for line in found if line["event"] == "end")
    assert ended["frames"] < 500 and ended["clips"]["purified"] > 4
    assert probe(output).frames == ended["shown"] > 10
    assert servers[0]["server"].closed


def test_passwords_are_shown_nowhere(tmp_path, servers, monkeypatch, capsys):
    """On the screen, in the record and in errors: of a camera that refuses, one that speaks, and an output."""
    monkeypatch.setattr(cli_watch, "_SUMMARY", 0.0)
    monkeypatch.setattr(live, "_RETRY", 0.0)
    record = tmp_path / "seen.jsonl"
    with RtspRelay() as gone:
        output = f"rtsp://me:secret@127.0.0.1:{gone.port}/live"
    with FakeCamera(sends(video_bytes(12))) as camera:
        sources = ["rtsp://me:secret@127.0.0.1:9/?token=secret", f"tcp://me:secret@127.0.0.1:{camera.port}"]
        targets = ["-o", tmp_path / "a.ts", "-o", output]
        interrupt_when(lambda: record.exists() and record.read_text().count('"clip"') > 8)
        status, shown, errors = run_main(
            monkeypatch, capsys, "watch", *sources, *targets, "--record", record, "--timeout", 0.5, "--window", 4
        )
    assert status == 1 and f"error: rtsp://***@127.0.0.1:{gone.port}/live: Connection refused" in errors
    for text in (shown, errors, record.read_text()):
        assert "secret" not in text and "rtsp://***@127.0.0.1" in text
    assert "Connection refused" in shown and any(line.get("reason") == "Connection refused" for line in lines(record))


def test_a_full_queue_drops_and_counts(tmp_path, servers, monkeypatch):
    make = cli_watch._server
    monkeypatch.setattr(cli_watch, "_server", lambda *given: make(*given, seconds=0.06))
    record = tmp_path / "seen.jsonl"
    options = ("--size", 16, "--window", 4, "--hop", 4, "--record", record)
    result = run(video(tmp_path / "a.mkv", 40), *options, "--queue", 1)
    assert result.exit_code == 0 and (servers[0]["policy"], servers[0]["waiting"]) == ("drop-oldest", 1)
    clips = lines(record)[-1]["clips"]
    assert clips["dropped"] and clips["purified"]
    assert f"clips {clips['purified']}, refused {clips['dropped']}" in result.output
    result = run(video(tmp_path / "a.mkv", 16), *options, "--policy", "block", "--queue", 1)
    assert result.exit_code == 0 and lines(record)[-1]["clips"] == {"purified": 4}  # a file waits


def test_without_a_terminal_there_is_a_line_now_and_then(tmp_path, servers, monkeypatch):
    monkeypatch.setattr(cli_watch, "_REFRESH", 0.05)
    monkeypatch.setattr(cli_watch, "_SUMMARY", 0.1)
    result = run(video(tmp_path / "a.mkv", 50), "--size", 16)
    shown = [line for line in result.output.splitlines() if "state live" in line]
    assert 2 <= len(shown) <= 5 and "\x1b" not in result.output and "queue age" in shown[-1]


def test_on_a_terminal_there_is_a_table(tmp_path, servers, monkeypatch):
    from rich.console import Console

    screen = open(tmp_path / "screen", "w+")
    monkeypatch.setattr(cli_watch, "_REFRESH", 0.05)
    monkeypatch.setattr(cli_watch, "console", Console(file=screen, force_terminal=True, width=160, markup=False))
    assert run(video(tmp_path / "a.mkv", 50), "--size", 16, "--classifier", "tiny").exit_code == 0
    screen.seek(0)
    text = screen.read()
    assert all(title in text for title in ("source", "frames in", "dropped", "label", "latency", "queue age"))
    assert "live" in text and "a.mkv" in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("absent.mp4",), "there is no file absent.mp4"),
        (("ftp://me:secret@host/x",), r"ftp://\*\*\*@host/x cannot be watched"),
        (("a.mkv", "-o", "o.mp4", "-o", "p.mp4"), "--output is given 2 times for 1 sources"),
        (("a.mkv", "a.mkv", "-o", "o.mp4", "-o", "./o.mp4"), "cannot write o.mp4: it is a SOURCE, or another --output"),
        (("a.mkv", "--record", "./a.mkv"), "cannot write a.mkv: it is a SOURCE"),
        (("a.mkv", "-o", "o.mp4", "--record", "o.mp4"), "cannot write o.mp4"),
        (("rtsp:/me:secret@host/x",), r"there is no file rtsp:/\*\*\*@host/x"),
        (("me:secret@host//x",), r"there is no file \*\*\*@host//x"),
        (("a.mkv", "-o", "rtsp//me:secret@host/x"), r"cannot write rtsp//\*\*\*@host/x"),
        (("a.mkv", "-o", "o.avi"), "accepted are .mp4, .mkv, .ts files"),
        (("a.mkv", "--deadline", 0), "--deadline"),
        (("a.mkv", "--timeout", -1), "timeout"),
        (("a.mkv", "--window", 9), "--window must be .*8"),
        (("a.mkv", "--window", 4, "--hop", 5), "--hop must be .*4"),
        (("a.mkv", "--size", 17), "size must be an even number"),
        (("a.mkv", "--size", 0), "size must be an even number"),
        (("a.mkv", "--record", "absent/r.jsonl"), "there is no folder absent"),
        (("a.mkv", "--classifier", "absent:make"), "classifier 'absent:make' cannot be made"),
    ],
)
def test_bad_options(tmp_path, servers, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    video(tmp_path / "a.mkv", 8)
    result = run(*arguments)
    assert result.exit_code == 1
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        raise result.exception
    assert "secret" not in str(result.exception) and sorted(os.listdir(tmp_path)) == ["a.mkv"]


def test_a_file_that_breaks_off_is_an_error_at_the_end(tmp_path, servers, monkeypatch, capsys):
    path = video(tmp_path / "a.mkv", 8)
    monkeypatch.setattr(cameras.Camera, "_follow", lambda *_given: "no picture for 5 s")
    status, shown, errors = run_main(monkeypatch, capsys, "watch", path, "--size", 16)
    assert status == 1 and f"error: {path}: no picture for 5 s" in errors and "state failed" in shown


def test_help(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    output = run("--help").output
    assert all(word in output for word in ("--classifier", "--window", "--hop", "--deadline", "--policy", "--record"))
    assert "videopure-fast watch /dev/video0" in output
