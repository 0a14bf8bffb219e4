"""The program around the commands: how it ends, what it asks of its environment, and what it leaves to its caller."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from videopure_fast import cli
from videopure_fast.cli import environment

CLIP = Path(__file__).parents[1] / "data" / "part_0.mp4"
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else 0
WAITING = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")


def program(*arguments: object, start: tuple[str, ...] = ("-m", "videopure_fast"), **variables: str):
    """A finished run of the program in a process of its own, without the waiting of this one's environment."""
    own = {name: value for name, value in os.environ.items() if name not in WAITING}
    command = [sys.executable, *start, *map(str, arguments)]
    return subprocess.run(command, env=own | variables, capture_output=True, text=True)


def embedded(monkeypatch, capsys, *arguments: object) -> tuple[object, str]:
    """The exit status of `main` called in this process, and what it prints to stderr."""
    monkeypatch.setattr(sys, "argv", ["videopure-fast", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code or 0, capsys.readouterr().err


# How it ends


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RuntimeError("backend 'cuda' is not here\nCompile with TORCH_USE_CUDA_DSA"), "backend 'cuda' is not here"),
        (RecursionError("maximum recursion depth exceeded"), "RecursionError: maximum recursion depth exceeded"),
        (OverflowError("int too large to convert to float"), "OverflowError: int too large to convert to float"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
        (NotImplementedError(), "NotImplementedError"),
        (RuntimeError(), "RuntimeError"),
        (MemoryError(), "MemoryError"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (ValueError("first line\n  second line"), "first line second line"),
        (ValueError(), "ValueError"),
    ],
)
def test_what_cannot_be_done_ends_in_one_sentence(tmp_path, monkeypatch, capsys, error, sentence):
    def probe(_path):
        raise error

    monkeypatch.setattr("videopure_fast.data.video.probe", probe)
    status, stderr = embedded(monkeypatch, capsys, "purify", CLIP, "-o", tmp_path / "out.mp4")
    assert (status, stderr) == (1, f"error: {sentence}\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("purify", CLIP, "-o", "{folder}/a.mp4", "--device", "meta"), "device 'meta' cannot be used"),
        (("purify", CLIP, "-o", "{folder}/a.mp4", "--device", "mkldnn"), "device 'mkldnn' cannot be used"),
        (("warmup", "--device", "fpga:1"), "device 'fpga:1' cannot be used"),
        (("bench", "--device", "", "--dtype", "float32"), "device '' cannot be used"),
        (("bench", "--compare", "{folder}/deep.json", "{folder}/deep.json"), "RecursionError: maximum recursion"),
        (("bench", "--frames", "9" * 30, "--batch", "1"), "error: "),
        (("warmup", "--batch", "9" * 30), "shape is (9999999999"),
        (("purify", CLIP, "-o", "{folder}/" + "a" * 252 + ".mp4"), "File name too long"),
        (("purify", CLIP, "-o", "{folder}/link.mp4"), "it is no regular file"),
        (("purify", "{folder}/" + "a" * 256, "-o", "{folder}/a.mp4"), "error: "),
        (("demo", "--out", "{folder}/" + "a" * 256), "cannot make the folder"),
    ],
)
def test_nonsense_ends_in_one_sentence(tmp_path, monkeypatch, capsys, arguments, words):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "link.mp4").symlink_to("/dev/null")
    before = sorted(tmp_path.iterdir())
    filled = [str(argument).replace("{folder}", str(tmp_path)) for argument in arguments]
    status, stderr = embedded(monkeypatch, capsys, *filled)
    assert status == 1 and words in stderr and "Traceback" not in stderr
    assert sum(line.startswith("error: ") for line in stderr.splitlines()) == 1
    assert not [path for path in set(tmp_path.iterdir()) - set(before) if path.is_file()]


# The environment


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("VIDEOPURE_FAST_BACKEND", "nope"),
        ("VIDEOPURE_FAST_BACKEND", "cpu,"),
        ("OMP_NUM_THREADS", "abc"),
        ("OMP_NUM_THREADS", "0"),
        ("OMP_NUM_THREADS", "-1"),
        ("OMP_NUM_THREADS", "2,x"),
        ("OMP_NUM_THREADS", "1e3"),
        ("MKL_NUM_THREADS", "99999999999999999999"),
        ("GOMP_SPINCOUNT", "many"),
        ("OMP_WAIT_POLICY", "lazy"),
        ("KMP_BLOCKTIME", "-5"),
        ("TRITON_INTERPRET", "true"),
    ],
)
@pytest.mark.parametrize("command", [("info",), ("purify", CLIP, "-o", "out.mp4"), ("bench",)])
def test_nonsense_in_the_environment_is_refused_at_the_start(tmp_path, monkeypatch, capsys, command, name, value):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(name, value)
    status, stderr = embedded(monkeypatch, capsys, *command)
    assert status == 1 and stderr.startswith("error: ") and stderr.count("\n") == 1
    wrong = value.rpartition(",")[2] if name == "VIDEOPURE_FAST_BACKEND" else value  # its last name, if it has several
    assert name in stderr and repr(wrong) in stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("VIDEOPURE_FAST_BACKEND", "triton, cuda"),
        ("VIDEOPURE_FAST_BACKEND", ""),
        ("OMP_NUM_THREADS", " 4, 2 "),
        ("MKL_NUM_THREADS", "8"),
        ("GOMP_SPINCOUNT", "Infinity"),
        ("GOMP_SPINCOUNT", "30 k"),
        ("OMP_WAIT_POLICY", "PASSIVE"),
        ("KMP_BLOCKTIME", "infinite"),
        ("TRITON_INTERPRET", "0"),
    ],
)
def test_sense_in_the_environment_is_accepted(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    environment.check_environment()


def test_info_refuses_nonsense_before_torch_is_loaded():
    done = program("info", OMP_NUM_THREADS="abc")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        "error: the environment variable OMP_NUM_THREADS is 'abc'; accepted: a whole number from 1 to 9999\n"
    )


# How threads wait


CONSOLE_SCRIPT = ("-c", "import sys; from videopure_fast.cli import main; sys.exit(main())")


@pytest.mark.skipif(
    sys.platform != "linux", reason="only on Linux does torch have GNU's OpenMP, which prints what it read"
)
@pytest.mark.parametrize(
    ("start", "variables", "rounds"),
    [
        (("-m", "videopure_fast"), {}, "5000"),
        (CONSOLE_SCRIPT, {}, "5000"),
        (CONSOLE_SCRIPT, {"OMP_WAIT_POLICY": "passive"}, "0"),
    ],
)
def test_the_openmp_runtime_spins_for_a_bounded_time(start, variables, rounds):
    done = program("info", start=start, OMP_DISPLAY_ENV="verbose", **variables)
    assert done.returncode == 0, done.stderr
    assert set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)) == {rounds}
    said = [*variables.items()] or [("GOMP_SPINCOUNT", "5000")]
    assert "waiting threads" in done.stdout and all("=".join(pair) in done.stdout for pair in said)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists a process's libraries in /proc")
def test_the_extension_runs_in_the_runtime_that_torch_has_loaded():
    pytest.importorskip("videopure_fast._C")
    code = "import torch, videopure_fast._C; print(open('/proc/self/maps').read())"
    maps = program(start=("-c", code)).stdout
    assert len(set(re.findall(r"\S*/lib(?:gomp|iomp5|omp)[^/\s]*", maps))) == 1


def test_a_library_user_keeps_the_runtimes_own_way(monkeypatch):
    for name in WAITING:
        monkeypatch.delenv(name, raising=False)
    assert "GOMP_SPINCOUNT=5000 suits a shared machine" in environment.wait_policy()
    with environment.as_program():  # torch is loaded already: its runtime reads nothing anymore
        assert not any(name in os.environ for name in WAITING)
    monkeypatch.delitem(sys.modules, "torch")
    with environment.as_program():
        assert os.environ["GOMP_SPINCOUNT"] == "5000"
    assert not any(name in os.environ for name in WAITING)


PURIFY = """
from videopure_fast.cli.environment import as_program
with as_program():
    import time, torch
    from videopure_fast import Purifier
    purifier, clip = Purifier.from_pretrained("tiny", device="cpu"), torch.rand(3, 16, 32, 32)
    for _ in range(3):
        purifier(clip)
    print("ready", flush=True)
    for _ in range({calls}):
        began = time.perf_counter()
        purifier(clip)
        print(time.perf_counter() - began, flush=True)
"""


def purifying(calls: int) -> subprocess.Popen:
    """A process that purifies clips as a command does, and prints how long each takes; it has warmed up."""
    own = {name: value for name, value in os.environ.items() if name not in (*WAITING, "OMP_NUM_THREADS")}
    code = PURIFY.format(calls=calls)
    process = subprocess.Popen([sys.executable, "-c", code], env=own, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def best(process: subprocess.Popen) -> float:
    with process:
        assert process.stdout is not None
        return min(map(float, process.stdout))


@pytest.mark.slow
@pytest.mark.skipif(CORES < 2, reason="needs two cores, and a system that binds processes to them")
def test_a_busy_neighbor_slows_a_clip_less_than_four_times():
    """The best clip of three runs, alone and beside an endless one, on the same two cores in the same test."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:2])
    try:
        alone = min(best(purifying(4)) for _ in range(3))
        neighbor = purifying(10**9)
        try:
            beside = min(best(purifying(4)) for _ in range(3))
        finally:
            neighbor.kill()
            neighbor.communicate()
    finally:
        os.sched_setaffinity(0, allowed)
    assert beside < 4 * alone, f"{beside:.3g} s beside a neighbor, {alone:.3g} s alone"


# What it leaves to its caller


def test_an_embedded_program_leaves_its_process_as_it_was(monkeypatch, capsys):
    def state():
        handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
        named = {name: value for name, value in os.environ.items() if name in WAITING}
        return (
            handlers,
            [*warnings.filters],
            warnings.formatwarning,
            warnings.showwarning,
            sys.excepthook,
            named,
            sys.path[:],
        )

    before = state()
    for arguments in (("info",), ("--help",), ("nonsense",), ("evaluate", "--classifier", "no_such:thing")):
        embedded(monkeypatch, capsys, *arguments)
        assert state() == before


def test_a_handler_of_the_callers_goes_first(monkeypatch, capsys):
    seen = []

    def own(*_):
        seen.append(1)

    def table(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        return {}

    before = signal.signal(signal.SIGTERM, own)
    try:
        monkeypatch.setattr("videopure_fast.ops.backend.backends", table)
        status, _ = embedded(monkeypatch, capsys, "info")
        assert status == 0 and seen == [1] and signal.getsignal(signal.SIGTERM) is own
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        status, _ = embedded(monkeypatch, capsys, "info")  # nobody's: the program cleans up and ends
        assert status == 143 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_thread_may_run_a_command(monkeypatch, capsys):
    found = []
    monkeypatch.setattr(sys, "argv", ["videopure-fast", "info"])

    def run():
        try:
            cli.main()
        except SystemExit as stopped:
            found.append(stopped.code)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [0] and "backend reference" in capsys.readouterr().out
