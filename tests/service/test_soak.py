"""A service under load for minutes, and as replicas of Ray Serve."""

from __future__ import annotations

import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from realtime_fakes import video_bytes
from service_fakes import until

ROOT = Path(__file__).resolve().parents[2]
MINUTES = 10

pytestmark = pytest.mark.serve


def started(tmp_path, *arguments, port):
    """The program, when it is warm."""
    environment = {**os.environ, "TMPDIR": str(tmp_path), "COLUMNS": "200"}
    command = [sys.executable, "-m", "videopure_fast", "serve", "--port", str(port), *arguments]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"

    def ready():
        assert process.poll() is None, (tmp_path / "log").read_text()
        try:
            return httpx.get(f"{address}/readyz", timeout=60).status_code == 200
        except httpx.TransportError:
            return False

    until(ready, 240)
    return process, address


def free_port():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def tree(pid):
    """A process and those that it has started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(one for child in children for one in tree(int(child)))]


def resident_bytes(pids):
    pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE")


def purify(address, content, **options):
    return httpx.post(f"{address}/v1/purify", files={"video": content}, timeout=300, **options)


def test_ten_minutes_at_eighty_percent(tmp_path):
    """Every answer is there, memory is as after the first two minutes, and nothing is left behind."""
    process, address = started(tmp_path, "--classifier", "tiny", "--size", "32", "--queue", "200", port=free_port())
    videos = [video_bytes(16, kind="matroska", start=i, noise=True, height=32, width=32) for i in range(4)]
    try:
        service = statistics.median(timed(lambda i=i: purify(address, videos[i % 4])) for i in range(12))
        assert service < 30
        held, statuses, files = [], [], []

        with ThreadPoolExecutor(64) as pool:
            for minute in range(MINUTES):
                futures = offered(pool, address, videos, 0.8 / service, seconds=60, seed=minute)
                answers = [future.result() for future in futures]
                statuses += [answer.status_code for answer in answers]
                held.append(resident_bytes(tree(process.pid)))
                files.append(len(os.listdir(f"/proc/{process.pid}/fd")))
                seconds = [answer.elapsed.total_seconds() for answer in answers]
                line = f"minute {minute + 1}: {len(answers)} videos, median {statistics.median(seconds):.2f} s"
                print(f"{line}, {held[-1] / 2**20:.0f} MiB, {files[-1]} files", flush=True)
        assert set(statuses) == {200}
        assert max(held[2:]) <= 1.02 * held[1] and max(files) <= files[1] + 4
        (folder,) = tmp_path.glob("videopure-fast-uploads-*")
        until(lambda: os.listdir(folder) == ["lock"])
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert process.returncode == 0 and not list(tmp_path.glob("videopure-fast-uploads-*"))


def timed(function):
    began = time.perf_counter()
    assert function().status_code == 200
    return time.perf_counter() - began


def offered(pool, address, videos, rate, *, seconds, seed):
    """Requests at the moments of a Poisson process, whether or not those before are answered."""
    draw, futures, moment, began = random.Random(seed), [], 0.0, time.monotonic()
    while (moment := moment + draw.expovariate(rate)) < seconds:
        time.sleep(max(0.0, began + moment - time.monotonic()))
        accept = draw.choice(["video/mp4", "application/x-ndjson"])
        futures.append(pool.submit(purify, address, draw.choice(videos), headers={"Accept": accept}))
    return futures


def test_two_replicas(tmp_path):
    """Both work, a live source is opened once for both, and refusals and departures are as without Ray."""
    pytest.importorskip("ray.serve")
    film = tmp_path / "film.mkv"
    film.write_bytes(video_bytes(400, kind="matroska", step=40))
    options = ("--classifier", "tiny", "--size", "32", "--steps", "0", "--replicas", "2", "--source", f"film={film}")
    process, address = started(tmp_path, *options, port=free_port())
    content = video_bytes(40, kind="matroska", noise=True)
    try:
        assert all(httpx.get(f"{address}/readyz", timeout=60).is_success for _ in range(20))  # both begin warm
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: purify(address, content), range(16)))
        assert {answer.status_code for answer in answers} <= {200, 503}
        good = [answer for answer in answers if answer.status_code == 200]
        assert len(good) >= 8 and len({answer.headers["x-label"] for answer in good}) == 1
        assert len({answer.content for answer in good}) == 1
        numbers = [httpx.get(f"{address}/metrics", timeout=60).text for _ in range(20)]
        created = {
            line for text in numbers for line in text.splitlines() if line.startswith("videopure_uploaded_bytes_c")
        }
        assert len(created) == 2  # each replica counts for itself
        refused = httpx.get(f"{address}/v1/info", headers={"Host": "evil.example"}, timeout=60)
        assert refused.status_code == 403
        assert purify(address, b"no video").status_code == 400
        lines = purify(address, content, headers={"Accept": "application/x-ndjson"}).text.splitlines()
        assert '"event": "done"' in lines[-1]
        look(address)
        go_away(address, content)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)
    assert process.returncode == 0, (tmp_path / "log").read_text()


def look(address):
    """Four viewers of a source, whichever replica they come to."""

    def view():
        with httpx.stream("GET", f"{address}/v1/live/film", timeout=60) as response:
            assert response.status_code == 200
            content = b""
            for piece in response.iter_bytes():
                content += piece
                if content.count(b"image/jpeg") == 5:
                    return content

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: view(), range(4)))


def go_away(address, content):
    """Clients that leave while the deepest purifications are at work: soon no replica works for them."""
    options = {"files": {"video": content}, "data": {"steps": 49}, "headers": {"Accept": "application/x-ndjson"}}

    def leave(_):
        with httpx.stream("POST", f"{address}/v1/purify", timeout=60, **options) as response:
            assert response.status_code == 200
            lines = response.iter_lines()  # the connection lasts as long as this
            begun.append(next(lines))
            at_work.wait(60)

    begun, at_work = [], threading.Event()
    with ThreadPoolExecutor(8) as pool:
        left = pool.map(leave, range(8))
        try:
            until(lambda: len(begun) == 8, 60)
            assert set(working(address)) == {"1.0"}  # Ray may show only the one that has less to do
        finally:
            at_work.set()
        assert len(list(left)) == 8
    assert sum('"started"' in line for line in begun) == 2  # one at each replica, the others wait
    until(lambda: working(address) == ["0.0", "0.0"], 10)
    assert purify(address, content).status_code == 200


def working(address):
    """How many videos each of the replicas works on that Ray sends a request to."""
    found = {}
    for _ in range(20):
        lines = httpx.get(f"{address}/metrics", timeout=60).text.splitlines()
        numbers = dict(line.rpartition(" ")[::2] for line in lines if not line.startswith("#"))
        found[numbers["videopure_uploaded_bytes_created"]] = numbers["videopure_working"]
    return list(found.values())
