import os
import shutil
import sys
from contextlib import ExitStack, nullcontext

import pytest
from scale_files import contents, write_video
from typer.testing import CliRunner

from videopure_fast import cli
from videopure_fast.cli.purify_dataset import _pool
from videopure_fast.data.datasets import VideoDataset
from videopure_fast.data.video import probe
from videopure_fast.scale.cluster import Pool
from videopure_fast.scale.driver import Rank
from videopure_fast.scale.manifest import MANIFEST, read_rows

SMALL = ("--size", 16, "--steps", 0)


def run(*arguments):
    return CliRunner().invoke(cli.app, ["purify-dataset", *map(str, arguments)])


@pytest.fixture
def videos(tmp_path):
    """Two classes of a video each, and one that is damaged."""
    write_video(tmp_path / "in" / "a" / "x.mp4")
    write_video(tmp_path / "in" / "b" / "deep" / "y.mp4", seed=1)
    (tmp_path / "in" / "b" / "z.mp4").write_bytes(b"no video")
    return tmp_path / "in"


@pytest.fixture
def alone(monkeypatch):
    """As a rank of torchrun, the only one, whose worker is in this process."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    made = []

    def run_here(jobs, make_worker):
        made.append(make_worker)
        worker = make_worker()
        yield from map(worker, jobs)

    monkeypatch.setattr("videopure_fast.scale.local.run_in_child", run_here)
    return made


def test_a_folder_with_classes(videos, tmp_path, alone):
    out = tmp_path / "out"
    result = run(videos, out, *SMALL)
    assert result.exit_code == 0, result.output
    assert "Rank 0: 2 files done and 1 failed, 0 settled before, of 3" in result.output
    assert "\nb/z.mp4: " in result.output and "--retry-errors" in result.output
    rows = {row.name: row for row in read_rows(out / MANIFEST)}
    assert {name: row.state for name, row in rows.items()} == {
        "a/x.mp4": "done",
        "b/deep/y.mp4": "done",
        "b/z.mp4": "failed",
    }
    assert "damaged or not a video" in rows["b/z.mp4"].error
    assert [sample.path for sample in VideoDataset.folder(out).samples] == [
        out / "a" / "x.mp4",
        out / "b" / "deep" / "y.mp4",
    ]
    assert probe(out / "a" / "x.mp4").frames == 3

    before = contents(out)
    write_video(videos / "b" / "z.mp4", seed=2)
    again = run(videos, out, *SMALL).output
    assert "0 files done and 0 failed, 3 settled before" in again
    assert "Of those settled before, 1 had failed." in again and "--retry-errors" in again
    assert contents(out) == before
    result = run(videos, out, *SMALL, "--retry-errors")
    assert "1 files done and 0 failed, 2 settled before" in result.output
    assert before.items() <= contents(out).items()
    assert "made with size 16, seed 0, and not with size 18, seed 1" in str(
        run(videos, out, "--size", 18, "--steps", 0, "--seed", 1).exception
    )


def test_a_data_set_with_annotations(videos, tmp_path, alone):
    (tmp_path / "classInd.txt").write_text("1 a\n2 b\n")
    (tmp_path / "testlist01.txt").write_text("b/deep/y.mp4\nb/z.mp4\na/x.mp4\n")
    out = tmp_path / "out"
    options = ("--dataset", "ucf101", "--annotations", tmp_path, *SMALL, "--format", "webm", "--lossless")
    assert run(videos, out, *options).exit_code == 0
    dataset = VideoDataset.ucf101(out, out)
    assert dataset.samples == [(out / "b" / "deep" / "y.webm", 1), (out / "a" / "x.webm", 0)]
    assert dataset.read(0).shape[0] == 3


def test_a_list(videos, tmp_path, alone):
    listing = tmp_path / "list.txt"
    listing.write_text(f"a/x.mp4\n{videos}/b/deep/y.mp4\n")
    out = tmp_path / "out"
    assert run(listing, out, "--videos", videos, *SMALL, "--format", "safetensors").exit_code == 0
    assert {name for name in contents(out) if not name.split("/")[-1].startswith(".")} == {
        "a/x.safetensors",
        "b/deep/y.safetensors",
    }


def test_a_dry_run_counts_and_estimates_and_writes_nothing(videos, tmp_path, monkeypatch):
    monkeypatch.setattr("videopure_fast.measure.profile._ROOFLINE_SECONDS", 0.01)
    out = tmp_path / "out"
    result = run(videos, out, *SMALL, "--dry-run", "--workers", 99)
    assert result.exit_code == 0, result.output
    assert "3 files, 0 of them settled and 3 to be done" in result.output
    assert "Of a sample of 3, 1 cannot be read" in result.output
    assert "3 workers may take about 0:00." in result.output  # a file each
    assert not out.exists()


@pytest.mark.parametrize("name", ["file", "file/below"])
@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_an_output_that_is_no_folder_is_refused_at_once(videos, tmp_path, name, options):
    (tmp_path / "file").touch()
    said = str(run(videos, tmp_path / name, *SMALL, *options).exception)
    assert said == f"cannot make the folder {tmp_path / name}: {tmp_path / 'file'} is no folder"


def test_a_dry_run_gives_no_hours_for_gpus_that_are_elsewhere(videos, tmp_path, monkeypatch):
    nodes = nullcontext([{"CPU": 8.0, "GPU": 2.0}])
    monkeypatch.setattr("videopure_fast.scale.cluster.connected", lambda _address, cpus: nodes)
    result = run(videos, tmp_path / "out", *SMALL, "--dry-run", "--address", "head:6379")
    assert result.exit_code == 0, result.output
    assert "3 to be done" in result.output and "the workers have GPUs" in result.output
    assert "hours" not in result.output


def test_a_rank_has_one_gpu_and_its_share_of_the_cores(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")

    def pool(num_gpus=None, num_cpus=None):
        wanted = {"workers": None, "num_cpus": num_cpus, "num_gpus": num_gpus}
        return _pool(ExitStack(), wanted, small=False, address=None, rank=Rank(1, 4), dry_run=False)

    assert (pool(), pool(0.5), pool(0)) == (Pool(1, 4, 1), Pool(1, 4, 0.5), Pool(1, 4, 0))
    assert pool(num_cpus=6) == Pool(1, 6, 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--lossless", "--crf", 3), "exclude each other"),
        (("--crf", 52), "CRF of 0 to 51, got 52"),
        (("--format", "safetensors", "--crf", 5), ".safetensors has one quality alone"),
        (("--size", 17), "even number of 16 pixels"),
        (("--timeout", 0), "--timeout must be more than 0"),
        (("--annotations", "x"), "--annotations needs --dataset"),
        (("--videos", "."), "--videos is of a list"),
        (("--dataset", "kinetics400"), "needs --annotations"),
        (("--dataset", "something-something-v2", "--annotations", "x", "--labels", "y"), "choose --format"),
        (("--dataset", "ucf101", "--annotations", "x", "--labels", "y"), "takes no --labels"),
    ],
)
def test_bad_options_are_refused_before_any_work(videos, tmp_path, arguments, words):
    result = run(videos, tmp_path / "out", *arguments)
    assert isinstance(result.exception, ValueError) and words in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_bad_places(videos, tmp_path, monkeypatch):
    assert "must be in folders apart" in str(run(videos, videos / "out").exception)
    assert "there is no folder or list" in str(run(tmp_path / "none", tmp_path / "out").exception)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--workers and --address are of Ray" in str(run(videos, tmp_path / "out", "--workers", 2).exception)


def test_without_ray_the_command_says_how_to_get_it(videos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    result = run(videos, tmp_path / "out", *SMALL)
    assert isinstance(result.exception, ImportError)
    assert "purify-dataset needs Ray: pip install 'videopure-fast[scale]'" in str(result.exception)
    assert "torchrun" in str(result.exception)


@pytest.mark.scale
def test_ranks_of_torchrun(videos, tmp_path):
    import subprocess

    shutil.copy(videos / "a" / "x.mp4", videos / "a" / "w.mp4")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "videopure_fast"]
    command = [*launch, "purify-dataset", str(videos), str(tmp_path / "out"), *map(str, SMALL)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_rows(tmp_path / "out" / MANIFEST)
    assert [row.state for row in rows] == ["done", "done", "done", "failed"]
    assert [path.name for path in (tmp_path / "out").glob("*.sqlite")] == [MANIFEST]
