"""The workers on Ray: what is killed, what is stuck, and what ten thousand rows cost."""

import contextlib
import functools
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from scale_files import IDENTITY, CopyingWorker, contents, named_jobs, small_recipe, write_video

from videopure_fast.scale.cluster import Pool, choose_pool, connected, run_on_ray
from videopure_fast.scale.driver import Counts, purify_dataset
from videopure_fast.scale.manifest import MANIFEST, read_rows
from videopure_fast.scale.rows import Row

HERE = Path(__file__).parent
ROUNDS, OWN_ROUNDS, FILES = 20, 4, 30
MACHINE = {"num_cpus": 1, "object_store_memory": 2**27, "include_dashboard": False}
ROWS = 10_000
MOST_SECONDS_A_ROW = 0.005
MOST_GROWTH = 16 * 2**20  # bytes of the driver from its thousandth row on


@pytest.fixture(autouse=True, scope="module")
def seen_by_workers():
    """Processes of Ray find this folder's modules and the package, and are no slower than others on the machine."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_worker_niceness", "0")
        patched.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parents[1])]))
        yield


@pytest.mark.parametrize(
    ("nodes", "asked", "expected"),
    [
        ([{"CPU": 8.0}], {"small": True}, Pool(8, 1, 0)),
        ([{"CPU": 8.0}], {"small": False}, Pool(1, 8, 0)),
        ([{"CPU": 8.0}, {"CPU": 4.0}], {"small": False}, Pool(3, 4, 0)),
        ([{"CPU": 8.0}], {"small": True, "num_cpus": 2}, Pool(4, 2, 0)),
        ([{"CPU": 8.0}], {"small": True, "workers": 3}, Pool(3, 1, 0)),
        ([{"CPU": 16.0, "GPU": 4.0}], {"small": True}, Pool(4, 4, 1)),
        ([{"CPU": 16.0, "GPU": 4.0}], {"small": False, "num_gpus": 0.5}, Pool(8, 2, 0.5)),
        ([{"CPU": 16.0, "GPU": 4.0}, {"CPU": 8.0}], {"small": False, "num_gpus": 0}, Pool(3, 8, 0)),
        ([{"CPU": 2.0, "GPU": 4.0}], {"small": False}, Pool(2, 1, 1)),
        ([{"CPU": 0.0}, {"CPU": 8.0}], {"small": False}, Pool(1, 8, 0)),
        ([{"GPU": 1.0}, {"CPU": 16.0, "GPU": 4.0}], {"small": False}, Pool(4, 4, 1)),
        ([{"CPU": 8.0}], {"small": False, "workers": 2}, Pool(2, 4, 0)),
        ([{"CPU": 8.0}, {"CPU": 4.0}], {"small": False, "workers": 5}, Pool(5, 2, 0)),
        ([{"CPU": 8.0, "GPU": 2.0}], {"small": False, "workers": 4, "num_gpus": 0.5}, Pool(4, 2, 0.5)),
    ],
)
def test_how_many_workers_there_are(nodes, asked, expected):
    options = {"workers": None, "num_cpus": None, "num_gpus": None} | asked
    assert choose_pool(nodes, **options) == expected


@pytest.mark.parametrize(
    ("node", "asked", "words"),
    [
        ({"CPU": 4.0}, {"num_gpus": 1}, "room for 0 workers of 1 cores and 1 GPUs, and not for 1:"),
        ({"CPU": 4.0}, {"workers": 5}, "room for 4 workers of 1 cores and 0 GPUs, and not for 5:"),
        ({"CPU": 4.0}, {"workers": 2, "num_cpus": 3}, "room for 1 workers of 3 cores and 0 GPUs, and not for 2:"),
        ({"CPU": 4.0, "GPU": 2.0}, {"workers": 3}, "room for 2 workers of 1 cores and 1 GPUs, and not for 3:"),
        ({"CPU": 0.0}, {"small": True}, "room for 0 workers of 1 cores and 0 GPUs, and not for 1:"),
    ],
)
def test_workers_that_have_no_room_are_not_waited_for(node, asked, words):
    options = {"small": False, "workers": None, "num_cpus": None, "num_gpus": None} | asked
    with pytest.raises(ValueError, match=words) as raised:
        choose_pool([node], **options)
    assert f"seen: {node['CPU']:g} cores" in str(raised.value)


def start(videos, out, log, address=None):
    command = [sys.executable, str(HERE / "kill_driver.py"), *map(str, (videos, out, log, *filter(None, [address])))]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def descendants(process):
    """Process numbers of what a process has started, and of what these have, with their commands."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            status = (entry / "stat").read_text().rpartition(")")[2].split()
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            parents[int(entry.name)] = int(status[1]), command
    found = {}
    for number, (_, command) in parents.items():
        above = number
        while above in parents and above != process:
            above = parents[above][0]
        if above == process and number != process:
            found[number] = command
    return found


def workers():
    """Process numbers of the workers that this process, or what it has started, has in Ray."""
    return [number for number, command in descendants(os.getpid()).items() if "MapWorker" in command]


def kill_a_worker(rng):
    """Whether there was one."""
    if numbers := workers():
        with contextlib.suppress(ProcessLookupError):
            os.kill(rng.choice(numbers), signal.SIGKILL)
            return True
    return False


def lives(process):
    """Whether a process runs; one that has ended, and whose parent does not ask, has no command."""
    with contextlib.suppress(OSError):
        return bool(Path(f"/proc/{process}/cmdline").read_bytes())
    return False


def wait_until(true, seconds=90):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def lines(log):
    return log.read_text().splitlines() if log.exists() else []


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    for i in range(FILES - 1):
        write_video(root / f"class {i % 3}" / f"{i:02}.mp4", frames=2 + i % 3, seed=i)
    (root / "damaged.mp4").write_bytes(b"no video")
    return root


@pytest.fixture(scope="module")
def cluster(seen_by_workers):
    """The address of a Ray cluster, which outlives drivers that are killed."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args=MACHINE | {"num_cpus": 4})
    yield made.address
    made.shutdown()


@pytest.fixture(scope="module")
def undisturbed(videos, cluster, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert start(videos, out, out.parent / "log", cluster).wait(300) == 0
    assert len(lines(out.parent / "log")) == FILES  # each once; the damaged one is found in purifying
    return out


@pytest.mark.scale
@pytest.mark.parametrize("seed", range(ROUNDS))
def test_kills_lose_nothing_and_do_nothing_twice(videos, cluster, undisturbed, tmp_path, seed):
    """The drivers of the first rounds have a Ray of their own, which dies with them."""
    rng, out, log = random.Random(seed), tmp_path / "out", tmp_path / "log"
    address = None if seed < OWN_ROUNDS else cluster
    killed = start(videos, out, log, address)
    began = rng.randrange(1, FILES // 2)
    wait_until(lambda: len(lines(log)) >= began or killed.poll() is not None)
    assert kill_a_worker(rng)
    time.sleep(rng.uniform(0, 0.8))
    own = {number for number, command in descendants(killed.pid).items() if re.search("ray::|default_worker", command)}
    assert killed.poll() is None and len(lines(log)) < FILES
    killed.kill()
    killed.wait()
    wait_until(lambda: not workers() and not any(map(lives, own)))  # also of a Ray that has no parent any more
    committed = [row.name.rpartition("/")[2] for row in read_rows(out / MANIFEST)]
    until = Counter(lines(log))

    resumed = start(videos, out, log, address)
    wait_until(lambda: len(lines(log)) > sum(until.values()) or resumed.poll() is not None)
    time.sleep(rng.uniform(0, 1))
    kill_a_worker(rng)
    assert resumed.wait(300) == 0
    assert read_rows(out / MANIFEST) == read_rows(undisturbed / MANIFEST)
    assert contents(out) == contents(undisturbed)
    total = Counter(lines(log))
    assert all(total[name] == until[name] for name in committed)
    assert set(total) == {path.name for path in videos.rglob("*.mp4")}
    print(f"{len(committed)} committed, {sum(total.values()) - FILES} begun again", end=" ")


@pytest.mark.scale
def test_a_stop_leaves_nothing_behind(videos, tmp_path):
    """SIGTERM and Ctrl-C end the workers, and what Ray has written; the same command goes on."""
    command = [sys.executable, "-m", "videopure_fast", "purify-dataset", str(videos), str(tmp_path / "out")]
    command += ["--size", "16", "--steps", "5", "--workers", "2"]
    for stop, status in ((signal.SIGINT, (130, 1)), (signal.SIGTERM, (143,))):
        driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        wait_until(lambda: any("MapWorker" in text for text in descendants(driver.pid).values()))  # noqa: B023
        time.sleep(5)
        own = [*descendants(driver.pid)]
        driver.send_signal(stop)
        said = driver.communicate(timeout=60)[1]
        assert driver.returncode in status and "Traceback" not in said, said
        wait_until(lambda: not any(Path(f"/proc/{number}").exists() for number in own))  # noqa: B023
        assert not [*Path("/tmp").glob(f"videopure-fast-ray-{driver.pid}-*")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"\d+ files done and \d failed, \d+ settled before, of {FILES}", done.stdout), done.stdout
    assert not done.stderr.strip(), done.stderr
    assert [row.state for row in read_rows(tmp_path / "out" / MANIFEST)].count("done") == FILES - 1


@pytest.mark.scale
def test_files_that_are_stuck_are_errors_and_the_others_are_done(tmp_path):
    names = [f"{i}.mp4" for i in range(6)] + ["stuck 0.mp4", "stuck 1.mp4"]
    jobs, out = named_jobs(tmp_path / "in", *names), tmp_path / "out"
    make_worker = functools.partial(CopyingWorker, small_recipe(out, timeout=1.0))
    with connected(None, cpus=2):
        run = functools.partial(run_on_ray, make_worker=make_worker, pool=Pool(2, 1, 0))
        assert purify_dataset(jobs, out, IDENTITY, run) == Counts(8, 0, done=6, failed=2)
    errors = {row.name: row.error for row in read_rows(out / MANIFEST) if row.error}
    assert errors == dict.fromkeys(names[6:], "it took more than 1 s")


@pytest.mark.scale
def test_a_cluster_may_lose_a_machine(tmp_path):
    from ray.cluster_utils import Cluster

    class Slow(CopyingWorker):
        def purify(self, source, target):
            time.sleep(0.1)
            return super().purify(source, target)

    jobs, out = named_jobs(tmp_path / "in", *(f"{i}.mp4" for i in range(40))), tmp_path / "out"
    cluster = Cluster(initialize_head=True, head_node_args=MACHINE)
    try:
        other = cluster.add_node(**MACHINE)
        with connected(cluster.address) as nodes:
            pool = choose_pool(nodes, small=True, workers=None, num_cpus=None, num_gpus=None)
            assert pool == Pool(2, 1, 0)
            run = functools.partial(run_on_ray, make_worker=functools.partial(Slow, small_recipe(out)), pool=pool)

            def report(counts):
                if counts.done == 10:
                    cluster.remove_node(other, allow_graceful=False)

            assert purify_dataset(jobs, out, IDENTITY, run, report=report) == Counts(40, 0, done=40)
    finally:
        cluster.shutdown()


def resident():
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


@pytest.mark.scale
def test_ten_thousand_rows_cost_little(tmp_path):
    jobs = named_jobs(tmp_path / "in", *(f"{i % 7}/{i}.mp4" for i in range(ROWS)))
    sizes, times = {}, {}

    class Stub:
        def __call__(self, job):
            return Row(job.name, job.output, "done", size=1, output_size=1)

    def report(counts):
        times.setdefault(counts.done, time.perf_counter())
        if counts.done % 1000 == 0:
            sizes[counts.done] = resident()

    with connected(None, cpus=2):
        run = functools.partial(run_on_ray, make_worker=Stub, pool=Pool(2, 1, 0))
        assert purify_dataset(jobs, tmp_path / "out", IDENTITY, run, report=report) == Counts(ROWS, 0, done=ROWS)
    seconds = (times[ROWS] - times[1]) / ROWS  # from the first row on: workers begin before
    print(f"{1e3 * seconds:.2f} ms a row;", {count: size >> 20 for count, size in sizes.items()}, "MiB")
    assert seconds < MOST_SECONDS_A_ROW
    assert sizes[ROWS] - sizes[1000] < MOST_GROWTH
