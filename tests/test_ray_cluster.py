"""Ray, joined or started for a while: what it leaves as it was. Ray itself is a stand-in here."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from videopure_fast.ray_cluster import connected

STORE = 2**27


@pytest.fixture
def ray(monkeypatch):
    """A stand-in that notes how it is called, and sets a handler of its own as Ray does."""
    found = SimpleNamespace(error=None, ended=0)

    def init(**options):
        found.options, found.environment = options, dict(os.environ)
        signal.signal(signal.SIGTERM, lambda *_: None)
        if found.error is not None:
            raise found.error

    def shutdown():
        found.ended += 1

    nodes = [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": False, "Resources": {"CPU": 9.0}}]
    module = SimpleNamespace(init=init, shutdown=shutdown, nodes=lambda: nodes)
    monkeypatch.setitem(sys.modules, "ray", module)
    monkeypatch.setenv("RAY_BACKEND_LOG_LEVEL", "info")
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    monkeypatch.delenv("RAY_OF_A_TEST", raising=False)
    return found


@pytest.mark.parametrize("error", [None, ConnectionError("nobody\nlistens")])
def test_everything_is_as_before(ray, error):
    before, handler, ray.error = dict(os.environ), signal.getsignal(signal.SIGTERM), error
    with (
        pytest.raises(RuntimeError, match="no Ray cluster on this machine: nobody listens") if error else nullcontext()
    ):
        with connected(None, store=STORE, cpus=1000.5, environment={"RAY_OF_A_TEST": "1"}) as nodes:
            assert nodes == [{"CPU": 2.0}]
            assert signal.getsignal(signal.SIGTERM) is handler and os.path.isdir(ray.options["_temp_dir"])
    assert dict(os.environ) == before and signal.getsignal(signal.SIGTERM) is handler
    assert ray.ended == 1 and not os.path.exists(ray.options["_temp_dir"])
    own = {name: ray.environment[name] for name in ray.environment.keys() - before.keys()}
    assert own == {"RAY_USAGE_STATS_ENABLED": "0", "RAY_OF_A_TEST": "1"}
    assert ray.environment["RAY_BACKEND_LOG_LEVEL"] == "info"  # which was set
    assert ray.options["address"] == "local" and ray.options["num_cpus"] == 1001


def test_a_cluster_is_joined_as_it_is(ray):
    with connected("10.0.0.1:6379", store=STORE):
        assert ray.options["address"] == "10.0.0.1:6379"
        assert not {"num_cpus", "object_store_memory", "_temp_dir"} & ray.options.keys()


def test_folders_of_killed_processes_are_deleted(ray, tmp_path, monkeypatch):
    monkeypatch.setattr("videopure_fast.ray_cluster.os.path.isdir", lambda path: False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    killed, ours, other = (tmp_path / f"videopure-fast-ray-{end}" for end in ("4194305-x", f"{os.getpid()}-x", "y"))
    for folder in (killed, ours, other):  # Linux numbers processes up to 4194304
        folder.mkdir()
    with connected(None, store=STORE):
        assert not killed.exists() and ours.exists() and other.exists()
