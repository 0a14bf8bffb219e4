"""The command `serve`: what it asks for, what it says, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from conftest import run_main
from fastapi import FastAPI
from realtime_fakes import video_bytes
from service_fakes import until
from starlette.exceptions import HTTPException
from typer.testing import CliRunner

from videopure_fast import cli
from videopure_fast.cli import serve as command
from videopure_fast.service import ray_serve, server, settings
from videopure_fast.service.limits import Limits
from videopure_fast.service.security import LOCAL_HOSTS

TOKEN = "a-token-of-a-test"


@pytest.fixture
def made(monkeypatch):
    """What the command makes an application of, without a model and without serving."""
    found = []
    monkeypatch.setattr(settings, "make_app", lambda one: found.append(one))
    monkeypatch.setattr(server, "serve", lambda app, listener, announce: (announce(), listener.close()))
    monkeypatch.setattr(server, "log_to_stderr", lambda: None)
    return found


def test_the_help_teaches():
    shown = CliRunner().invoke(cli.app, ["serve", "--help"]).output
    for words in (
        "POST /v1/purify",
        "Authorization: Bearer TOKEN",
        "curl --fail --retry 9 -F video=@clip.mp4",
        "--max-frames",
        "503",
    ):
        assert words in shown


def test_this_machine_alone_by_default(monkeypatch, capsys, made):
    status, shown, _ = run_main(monkeypatch, capsys, "serve", "--port", 0, "--classifier", "tiny", "--queue", 3)
    assert status == 0 and re.search(r"Serving at http://127\.0\.0\.1:\d+; Ctrl-C ends it\.\n", shown)
    assert "token" not in shown
    (one,) = made
    assert (one.token, one.hosts, one.size, one.classifier) == (None, LOCAL_HOSTS, 64, "tiny")
    assert one.limits == Limits(bytes=64_000_000, waiting=3)


def test_a_token_is_made_where_others_reach_it(monkeypatch, capsys, made):
    status, shown, _ = run_main(monkeypatch, capsys, "serve", "--host", "0.0.0.0", "--port", 0)
    assert status == 0 and made[0].hosts is None
    assert f"Callers need the token {made[0].token}\n" in shown and len(made[0].token) > 40
    assert TOKEN not in repr(made[0])


def test_a_token_is_given(monkeypatch, capsys, made, tmp_path):
    monkeypatch.setenv(command.TOKEN, TOKEN)
    status, shown, _ = run_main(monkeypatch, capsys, "serve", "--port", 0, "--allow-host", "box.local")
    assert status == 0 and made[0].token == TOKEN and TOKEN not in shown and "Callers need the token." in shown
    assert made[0].hosts == (*LOCAL_HOSTS, "box.local") and command.TOKEN not in os.environ
    file = tmp_path / "token.txt"
    file.write_text(f"{TOKEN}-2\n")
    assert run_main(monkeypatch, capsys, "serve", "--port", 0, "--token-file", file)[0] == 0
    assert made[1].token == f"{TOKEN}-2" and TOKEN not in repr(made[1])
    file.write_text("short")
    status, _, errors = run_main(monkeypatch, capsys, "serve", "--port", 0, "--token-file", file)
    assert status == 1 and errors.startswith("error: the token cannot be used; accepted: 16 or more")
    status, _, errors = run_main(monkeypatch, capsys, "serve", "--port", 0, "--token-file", tmp_path / "none")
    assert status == 1 and "the token cannot be read from" in errors


def test_every_address_that_is_printed_is_allowed(monkeypatch, capsys, made):
    status, shown, _ = run_main(
        monkeypatch, capsys, "serve", "--port", 0, "--host", "127.0.0.2", "--allow-host", "box.local"
    )
    assert status == 0 and "http://127.0.0.2:" in shown
    assert made[0].hosts == (*LOCAL_HOSTS, "127.0.0.2", "box.local") and made[0].token is None
    run_main(monkeypatch, capsys, "serve", "--port", 0, "--host", "0.0.0.0", "--allow-host", "box.local")
    assert made[1].hosts == ("0.0.0.0", "box.local")
    found = [(None, None, None, "", (number, 0)) for number in ("127.0.1.1", "::1%lo")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert server.names_of("box") == ["box", "127.0.1.1", "[::1]"] and server.is_local("box")


@pytest.mark.parametrize("name", ["box:8000", "::1", "http://box", ""])
def test_names_that_no_request_states_are_refused(monkeypatch, capsys, made, name):
    status, _, errors = run_main(monkeypatch, capsys, "serve", "--port", 0, "--allow-host", name)
    accepted = "accepted: a name or a number, no port, IPv6 in brackets"
    assert status == 1 and errors == f"error: {name!r} is no name of a host; {accepted}\n" and not made


def test_sources_are_named(monkeypatch, capsys, made, tmp_path):
    film, listed = tmp_path / "film.mkv", tmp_path / "sources.txt"
    film.write_bytes(video_bytes(4, kind="matroska"))
    listed.write_text(f"door=rtsp://user:hidden@camera/live\n\nfilm={film}\n")
    assert (
        run_main(monkeypatch, capsys, "serve", "--port", 0, "--source", f"@{listed}", "--source", "b=udp://h:1")[0] == 0
    )
    assert made[0].sources == {"door": "rtsp://user:hidden@camera/live", "film": str(film), "b": "udp://h:1"}
    for pair, words in (
        ("rtsp://user:hidden@camera/live", "the source rtsp://***@camera/live has no address"),
        (f"door={tmp_path / 'none.mp4'}", "there is no file"),
        ("a b=udp://h:1", "a source is named 'a b'"),
        ("door=concat:a|b", "there is no file"),
        ("@nothing.txt", "nothing.txt"),
    ):
        status, _, errors = run_main(monkeypatch, capsys, "serve", "--source", pair)
        assert status == 1 and words in errors and "hidden" not in errors
    status, _, errors = run_main(monkeypatch, capsys, "serve", "--source", "a=udp://h:1", "--source", "a=udp://h:2")
    assert status == 1 and "the source a is given twice; accepted: NAME=SOURCE, each name once" in errors


def test_what_is_missing_is_said_in_a_sentence(monkeypatch, capsys, made):
    real = command.find_spec
    monkeypatch.setattr(command, "find_spec", lambda name: None if name in ("uvicorn", "ray") else real(name))
    status, _, errors = run_main(monkeypatch, capsys, "serve")
    assert status == 1
    assert errors == "error: serve needs uvicorn, not installed here; pip install 'videopure-fast[serve]'\n"
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "ray" else real(name))
    status, _, errors = run_main(monkeypatch, capsys, "serve", "--replicas", 2)
    assert errors == "error: --replicas needs Ray Serve, which is not installed here; pip install 'ray[serve]>=2.60'\n"


def test_replicas_join_nobodys_cluster(monkeypatch, capsys, made):
    monkeypatch.setattr(command, "find_spec", lambda name: True)
    monkeypatch.setattr(ray_serve, "run", lambda *_, **__: pytest.fail("it was started"))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    status, shown, errors = run_main(monkeypatch, capsys, "serve", "--replicas", 2)
    assert status == 1 and not shown and "but RAY_ADDRESS is 10.0.0.1:6379; accepted: unset it, or run" in errors
    assert run_main(monkeypatch, capsys, "serve", "--port", 0)[0] == 0  # one alone needs no Ray


def test_a_place_that_is_taken_or_none(monkeypatch, capsys, made):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status, _, errors = run_main(monkeypatch, capsys, "serve", "--port", taken.getsockname()[1])
    assert status == 1 and re.match(r"error: cannot listen at 127\.0\.0\.1, port \d+: .*in use", errors)
    status, _, errors = run_main(monkeypatch, capsys, "serve", "--host", "no such host")
    assert status == 1 and errors.startswith("error: the host 'no such host' is not known here")
    for value in ("nan", "inf", "0"):
        said = run_main(monkeypatch, capsys, "serve", "--max-megabytes", value)[2]
        assert said.startswith("error: --max-megabytes must be more than 0 and finite, got")
    assert run_main(monkeypatch, capsys, "serve", "--max-frames", 2, "--max-seconds", 0)[2].startswith(
        "error: the limit seconds"
    )
    assert not made


def test_replicas_get_their_share():
    assert ray_serve.resources(2, cores=9, gpus=0) == {"num_cpus": 4}
    assert ray_serve.resources(4, cores=2, gpus=0) == {"num_cpus": 0.5}
    assert ray_serve.resources(2, cores=64, gpus=8) == {"num_cpus": 1, "num_gpus": 1}
    assert ray_serve.resources(4, cores=64, gpus=2) == {"num_cpus": 1, "num_gpus": 0.5}
    limits = Limits(working=1, waiting=2, uploads=3, viewers=4)
    assert ray_serve.ongoing(limits) == 18
    one = settings.Settings("tiny", 64, limits._replace(upload=2.0, answer=3.0, taking=4.0))
    assert ray_serve.longest(one) == 9.0 and ray_serve.longest(replace(one, sources={"door": "udp://h:1"})) is None


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_program_serves_and_ends(tmp_path, number):
    """With the packaged model; its folder of uploads goes with it."""
    environment = {**os.environ, "TMPDIR": str(tmp_path), "COLUMNS": "200", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "videopure_fast", "serve", "--port", "0", "--classifier", "tiny", "--steps", "0"],
        env=environment,
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        address = re.search(r"http://\S+:\d+", process.stdout.readline())[0]
        until(lambda: httpx.get(f"{address}/readyz", timeout=60).status_code == 200, 120)
        content = video_bytes(6, kind="matroska")
        response = httpx.post(f"{address}/v1/purify", files={"video": content}, timeout=120)
        assert response.status_code == 200 and response.headers["x-label"]
        assert len(list(tmp_path.glob("videopure-fast-uploads-*"))) == 1
        process.send_signal(number)
        shown, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and shown.endswith("Ended.\n")
    assert "POST /v1/purify 200" in errors and "Traceback" not in errors
    assert not list(tmp_path.glob("videopure-fast-uploads-*"))


@pytest.mark.slow
def test_a_killed_program_leaves_nothing_for_long(tmp_path):
    """Its folder is removed by the next one, and its decoders end by themselves."""
    from videopure_fast.service.uploads import UploadFolder

    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "videopure_fast", "serve", "--port", "0", "--steps", "0"],
        env=environment,
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    process.stdout.readline()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until(lambda: len(children.read_text().split()) == Limits().working)
    decoders = children.read_text().split()
    process.kill()
    process.communicate()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in decoders), 30)
    assert len(list(tmp_path.iterdir())) == 1
    with UploadFolder(tmp_path) as folder:
        assert list(tmp_path.iterdir()) == [folder.path]


@pytest.mark.parametrize("fails", [False, True])
def test_replicas_begin_warm_or_not_at_all(fails):
    """A replica that refuses at once would be chosen before those that are at work."""
    seen = []

    class Engine:
        async def warmed(self):
            seen.append("warm")

        def check_ready(self):
            if fails:
                raise HTTPException(503, "it could not be warmed up")

    @contextlib.asynccontextmanager
    async def lifespan(app):
        app.state.engine = Engine()
        seen.append("begun")
        yield
        seen.append("ended")

    app = ray_serve._warm_first(FastAPI(lifespan=lifespan))

    async def serve():
        async with app.router.lifespan_context(app):
            seen.append("serves")

    with pytest.raises(HTTPException) if fails else contextlib.nullcontext():
        asyncio.run(serve())
    assert seen == (["begun", "warm"] if fails else ["begun", "warm", "serves", "ended"])


def test_errors_of_ray_are_a_line(monkeypatch):
    class RayError(Exception):
        pass

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(exceptions=SimpleNamespace(RayError=RayError)))
    with pytest.raises(RuntimeError, match="^Ray could not start the service: The actor died: killed$"):
        with ray_serve._told():
            raise RayError("The actor died:\n\tkilled")
