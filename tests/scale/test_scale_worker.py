import errno
import json
import multiprocessing
import os
import shutil
import warnings
from pathlib import Path

import av
import pytest
import torch
from media_files import audio_packets, encode
from safetensors.torch import load_file, save_file
from scale_files import CopyingWorker, make_job, named_jobs, small_recipe, write_video

from videopure_fast import Purifier
from videopure_fast.data.video import probe, read_frames
from videopure_fast.scale.worker import FileWorker, Recipe, digest_path, file_digest, is_full
from videopure_fast.streaming import purified_frames, purify_file
from videopure_fast.tiny.models import WEIGHTS


@pytest.fixture(scope="module")
def tiny():
    return Purifier.from_pretrained("tiny", device="cpu", inversion_steps=0)


@pytest.fixture
def worker_of(tiny, monkeypatch):
    """Workers of a recipe, which share a purifier."""
    monkeypatch.setattr(Recipe, "load", lambda _recipe, _device: tiny)
    return FileWorker


@pytest.fixture
def places(tmp_path):
    """Folders of videos and of outputs, the one with a video in it."""
    write_video(tmp_path / "in" / "a" / "clip.mp4")
    return tmp_path / "in", tmp_path / "out"


def never(*_given):
    raise AssertionError("purified again")


def test_an_output_is_that_of_a_purification_alone(places, worker_of, tiny, tmp_path):
    root, out = places
    source = root / "a" / "clip.mp4"
    row = worker_of(small_recipe(out))(make_job(source, root))
    output = out / "a" / "clip.mp4"
    purify_file(tiny, source, tmp_path / "alone.mp4", size=16)
    assert output.read_bytes() == (tmp_path / "alone.mp4").read_bytes()
    assert (row.state, row.frames, row.size, row.error) == ("done", 3, source.stat().st_size, None)
    assert (row.input_digest, row.output_digest) == (file_digest(source), file_digest(output))
    assert len(row.settings) == len(row.weights) == 16
    assert {path.name for path in output.parent.iterdir()} == {"clip.mp4", digest_path(output).name}
    assert digest_path(output).name.startswith(".clip-") and not list((out / ".videopure-fast" / "driver").iterdir())


def test_a_finished_output_is_adopted_if_nothing_has_changed(places, worker_of, monkeypatch):
    root, out = places
    job, output = make_job(root / "a" / "clip.mp4", root), out / "a" / "clip.mp4"
    worker = worker_of(small_recipe(out))
    row = worker(job)
    made = output.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(FileWorker, "purify", never)
        assert worker(job) == row

    def note(**changes):
        digest_path(output).write_text(json.dumps(row._asdict() | changes))

    for spoil in (
        lambda: output.write_bytes(b"cut off"),
        output.unlink,
        lambda: digest_path(output).write_text("{"),
        lambda: digest_path(output).write_text("[]"),
        lambda: note(frames="3"),
        lambda: note(warnings=["no sound"]),
        lambda: note(warnings="\udcff"),
        lambda: note(state="failed", error="damaged", size="7"),
    ):
        spoil()
        assert worker(job) == row and output.read_bytes() == made
    write_video(root / "a" / "clip.mp4", seed=1)
    other = worker(job)
    assert other.output_digest == file_digest(output) != row.output_digest
    assert worker_of(small_recipe(out, quality=30))(job).output_digest != other.output_digest


def test_a_link_is_replaced_and_not_followed(places, worker_of):
    root, out = places
    out.mkdir()
    (out / "a").mkdir()
    source = root / "a" / "clip.mp4"
    before = source.read_bytes()
    (out / "a" / "clip.mp4").symlink_to(source)
    assert worker_of(small_recipe(out))(make_job(source, root)).state == "done"
    assert source.read_bytes() == before and not (out / "a" / "clip.mp4").is_symlink()


def test_a_link_in_place_of_a_digest_is_replaced_too(tmp_path):
    job, elsewhere = named_jobs(tmp_path / "in", "a.mp4")[0], tmp_path / "elsewhere.json"
    note = digest_path(tmp_path / "out" / "a.mp4")
    note.parent.mkdir()
    note.symlink_to(elsewhere)
    assert CopyingWorker(small_recipe(tmp_path / "out"))(job).state == "done"
    assert not elsewhere.exists() and not note.is_symlink()


def test_a_folder_of_many_outputs_is_not_listed(tmp_path, monkeypatch):
    jobs, out = named_jobs(tmp_path / "in", "a.mp4", "b.mp4"), tmp_path / "out"
    worker, listed = CopyingWorker(small_recipe(out)), []
    for name in ("listdir", "scandir"):
        look = getattr(os, name)
        monkeypatch.setattr(os, name, lambda place, look=look: (listed.append(place), look(place))[1])
    assert [worker(job).state for job in jobs] == ["done", "done"]
    assert out not in [Path(place) for place in listed if not isinstance(place, int)]


def test_what_workers_that_died_had_written_is_deleted(tmp_path):
    job, other = named_jobs(tmp_path / "in", "a.mp4", "b.mp4")
    worker = CopyingWorker(small_recipe(tmp_path / "out"))
    work = tmp_path / "out" / ".videopure-fast" / "driver"
    for key in (job.key, other.key):
        (work / f"{key}-01234567").mkdir()
        (work / f"{key}-01234567" / "output.mp4").write_bytes(b"part")
    (work / f"{job.key}.log").write_text("begun\n")
    assert worker(job).state == "done"
    assert [path.name for path in work.iterdir()] == [f"{other.key}-01234567"]  # another worker is at it


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda path: path.unlink(), "there is no file"),
        (lambda path: path.write_bytes(path.read_bytes()[:600]), "damaged"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: (path.unlink(), path.mkdir()), "is no regular file"),
    ],
)
def test_what_is_wrong_with_a_file_is_in_its_row(places, worker_of, break_it, words):
    root, out = places
    path = root / "a" / "clip.mp4"
    break_it(path)
    row = worker_of(small_recipe(out))(make_job(path, root))
    assert row.state == "failed" and words in row.error and not (out / "a" / "clip.mp4").exists()
    assert not list((out / ".videopure-fast" / "driver").iterdir())


def test_a_link_that_leads_out_is_an_error(places, worker_of, tmp_path):
    root, out = places
    out.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (out / "a").symlink_to(tmp_path / "elsewhere")
    write_video(root / "a" / "new" / "clip.mp4")
    row = worker_of(small_recipe(out))(make_job(root / "a" / "new" / "clip.mp4", root))
    assert row.state == "failed" and "leads a/new/clip.mp4 out of" in row.error
    assert not list((tmp_path / "elsewhere").iterdir())


def test_what_a_link_leads_out_to_is_not_adopted(tmp_path):
    job, out = named_jobs(tmp_path / "in", "a/clip.mp4")[0], tmp_path / "out"
    worker = CopyingWorker(small_recipe(out))
    assert worker(job).state == "done"
    (out / "a").rename(tmp_path / "elsewhere")
    (out / "a").symlink_to(tmp_path / "elsewhere")
    assert "leads a/clip.mp4 out of" in worker(job).error


def test_hostile_names(tmp_path):
    worker = CopyingWorker(small_recipe(tmp_path / "out"))
    for name in ("-rf.mp4", "a\nb.mp4", "'; DROP TABLE files.mp4", "ü😀.mp4", "x" * 250 + ".mp4"):
        path = tmp_path / name
        path.write_bytes(b"x")
        assert worker(make_job(path, tmp_path)).state == "done", name
        assert (tmp_path / "out" / name).read_bytes() == b"x"
    raw = os.fsencode(tmp_path) + b"/a\xff.mp4"
    with open(raw, "wb"):
        pass
    row = worker(make_job(os.fsdecode(raw), tmp_path))
    assert row.state == "failed" and "not UTF-8" in row.error
    row.name.encode()  # so that a manifest can hold it


def test_what_is_said_of_a_folder_whose_name_is_not_utf8_can_be_kept(tmp_path, monkeypatch):
    jobs = named_jobs(tmp_path / "in", "bad.mp4", "a.mp4")

    def purify(worker, source, target):
        if source.name == "bad.mp4":
            raise ValueError(f"cannot use {target.parent}")
        warnings.warn(f"something of {target.parent}", stacklevel=1)
        return CopyingWorker.copy(worker, source, target)

    monkeypatch.setattr(CopyingWorker, "copy", CopyingWorker.purify, raising=False)
    monkeypatch.setattr(CopyingWorker, "purify", purify)
    worker = CopyingWorker(small_recipe(Path(os.fsdecode(os.fsencode(tmp_path) + b"/o\xff"))))
    bad, good = map(worker, jobs)
    for text in (bad.error, good.warnings):
        assert b"o\\udcff" in text.encode()


def test_a_full_disk_is_no_error_of_the_file(tmp_path, monkeypatch):
    def purify(_worker, _source, target):
        target.write_bytes(b"part")
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise OSError(f"cannot write {target}") from error

    monkeypatch.setattr(CopyingWorker, "purify", purify)
    (tmp_path / "a.mp4").write_bytes(b"x")
    row = CopyingWorker(small_recipe(tmp_path / "out"))(make_job(tmp_path / "a.mp4", tmp_path))
    assert row.state == "full" and row.error == "cannot write a.mp4"
    assert not list((tmp_path / "out" / ".videopure-fast" / "driver").iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full, a full disk, is a device of Linux alone")
def test_what_ffmpeg_says_of_a_full_disk_is_known():
    with pytest.raises(OSError) as raised, av.open("file:/dev/full", "w", format="matroska") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height = stream.width = 16
        stream.pix_fmt = "yuv420p"
        container.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
        container.mux(stream.encode())
    assert is_full(raised.value) and not is_full(ValueError("damaged"))


def test_what_safetensors_says_of_a_full_disk_is_known(places, worker_of, monkeypatch):
    """A file may have so many bytes, in place of a disk."""
    resource = pytest.importorskip("resource")
    monkeypatch.setattr("videopure_fast.scale.worker._FULL", {errno.EFBIG})
    root, out = places
    worker, limits = worker_of(small_recipe(out, suffix=".safetensors")), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        row = worker(make_job(root / "a" / "clip.mp4", root, ".safetensors"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (row.state, row.error) == ("full", "[Errno 27] File too large: 'a/clip.safetensors'")


def test_a_file_that_is_stuck_ends_its_worker_and_is_given_up(tmp_path):
    (tmp_path / "stuck.mp4").write_bytes(b"x")
    job = make_job(tmp_path / "stuck.mp4", tmp_path)
    worker = CopyingWorker(small_recipe(tmp_path / "out", timeout=0.2))
    process = multiprocessing.get_context("fork").Process(target=worker, args=(job,))
    process.start()
    process.join(20)
    assert process.exitcode == 1
    for _ in range(2):  # whoever asks again is told the same at once
        row = worker(job)
        assert (row.state, row.error) == ("failed", "it took more than 0.2 s")


def test_a_file_at_which_workers_die_is_given_up(tmp_path, monkeypatch):
    class Died(BaseException):
        pass

    def die(*_given):
        raise Died

    (tmp_path / "a.mp4").write_bytes(b"x")
    job = make_job(tmp_path / "a.mp4", tmp_path)
    worker = CopyingWorker(small_recipe(tmp_path / "out"))
    with monkeypatch.context() as patched:
        patched.setattr(CopyingWorker, "purify", die)
        for _ in range(2):
            with pytest.raises(Died):
                worker(job)
    assert worker(job).state == "done"
    (tmp_path / "out" / "a.mp4").unlink()
    monkeypatch.setattr(CopyingWorker, "purify", die)
    for _ in range(3):
        with pytest.raises(Died):
            worker(job)
    assert (worker(job).state, worker(job).error) == ("failed", "3 workers died of it")


def test_other_weights_than_the_drivers_are_refused(places, worker_of):
    with pytest.raises(ValueError, match="has other weights here"):
        worker_of(small_recipe(places[1], weights="0" * 16))


def test_a_prior_of_other_prompts_or_another_configuration_is_another(tiny, tmp_path):
    folders = [tmp_path / name for name in ("one", "moved", "edited", "scaled")]
    for folder in folders:
        shutil.copytree(WEIGHTS, folder)
    prompts = {name: value + 1 for name, value in load_file(WEIGHTS / "prompt_embeds.safetensors").items()}
    save_file(prompts, folders[2] / "prompt_embeds.safetensors")
    config = folders[3] / "vae" / "config.json"
    config.write_text(config.read_text().replace("1.08404", "1.5"))
    recipes = [small_recipe(tmp_path / "out", model=str(folder)) for folder in folders]
    one, moved, edited = (recipe.identity(tiny) for recipe in recipes[:3])
    scaled = recipes[3].identity(recipes[3].load("cpu"))
    assert one == moved == recipes[1].identity(recipes[1].load("cpu"))
    for other, name in ((edited, "prompts"), (scaled, "configs")):
        assert [key for key in one if one[key] != other[key]] == [name]


def test_a_gpu_that_torch_cannot_use_is_not_replaced_by_the_cpu(places, worker_of):
    with pytest.raises(ValueError, match="a GPU that its torch cannot use: ask for --num-gpus 0"):
        worker_of(small_recipe(places[1], device=None))


def test_tensors(places, worker_of, tiny):
    root, out = places
    path = encode(root / "times.mp4", times=[0, 40, 200], sound="aac")
    row = worker_of(small_recipe(out, suffix=".safetensors"))(make_job(path, root, ".safetensors"))
    assert (row.output, row.frames) == ("times.safetensors", 3)
    assert row.warnings == "times.safetensors has no sound: safetensors holds tensors alone"
    found = load_file(out / "times.safetensors")
    assert torch.equal(found["clip"], torch.stack([*purified_frames(tiny, probe(path), size=16)], 1))
    assert found["seconds"].tolist() == pytest.approx([0, 0.04, 0.2])


def test_times_and_sound_are_kept(places, worker_of):
    root, out = places
    path = encode(root / "times.mp4", times=[0, 40, 200, 220], sound="aac")
    row = worker_of(small_recipe(out))(make_job(path, root))
    assert (row.state, row.warnings) == ("done", None)
    source, made = probe(path), probe(out / "times.mp4")
    assert [made.time(i) for i in range(4)] == [source.time(i) for i in range(4)]
    assert [content for _, content in audio_packets(out / "times.mp4")] == [
        content for _, content in audio_packets(path)
    ]


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_lossless_outputs_keep_every_pixel(places, worker_of, tiny, suffix):
    root, out = places
    source = root / "a" / "clip.mp4"
    row = worker_of(small_recipe(out, suffix=suffix, quality="lossless"))(make_job(source, root, suffix))
    assert row.state == "done", row.error
    read = [*read_frames(probe(out / row.output), 16)]
    expected = [*purified_frames(tiny, probe(source), size=16)]
    assert torch.equal(torch.stack(read), torch.stack(expected))
