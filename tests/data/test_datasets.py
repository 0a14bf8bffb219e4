import json
import os
import warnings

import pytest
import torch

from videopure_fast.data import annotations, sources
from videopure_fast.data.datasets import Batch, ClipSampling, VideoDataset, draws, load
from videopure_fast.data.video_writer import VideoWriter

SMALL = ClipSampling(frames=4, stride=2, resize=32, crop=24)


def write(path, frames=12, height=48, width=64, level=None):
    """Frame i is gray of 8 * i, or all of one level."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, height=height, width=width, rate=25) as writer:
        for i in range(frames):
            gray = 8 * i if level is None else level
            writer.write(torch.full((3, height, width), gray, dtype=torch.uint8))
    return path


def frames_of(clip):
    """Which frames of such a video a clip holds."""
    return (clip.mean((0, 2, 3)) * 255 / 8).round().int().tolist()


@pytest.fixture
def ucf(tmp_path):
    videos, splits = tmp_path / "UCF-101", tmp_path / "ucfTrainTestlist"
    for i, name in enumerate(["Archery/v_Archery_g01_c01.avi", "BaseballPitch/v_Base_g01_c01.avi"]):
        write(videos / name, level=60 + 60 * i)
    write(videos / "Archery/v_Archery_g08_c01.avi", level=180)
    splits.mkdir()
    (splits / "classInd.txt").write_text("1 Archery\n2 BaseballPitch\n3 Kayaking\n")
    (splits / "testlist01.txt").write_text("Archery/v_Archery_g01_c01.avi\nBaseballPitch/v_Base_g01_c01.avi\n")
    (splits / "trainlist01.txt").write_text("Archery/v_Archery_g08_c01.avi 1\n")
    return videos, splits


def test_ucf101(ucf):
    videos, splits = ucf
    dataset = VideoDataset.ucf101(videos, splits, sampling=SMALL)
    assert dataset.classes == ("Archery", "BaseballPitch", "Kayaking")
    assert [sample.label for sample in dataset.samples] == [0, 1] and len(dataset) == 2
    for i, gray in enumerate([60, 120]):
        clip, label = dataset[i]
        assert clip.shape == (3, 4, 24, 24) and clip.dtype == torch.float32 and (label, type(label)) == (i, int)
        assert (clip * 255 - gray).abs().max() <= 3
    train = VideoDataset.ucf101(videos, splits, split="train", sampling=SMALL)
    assert train.samples == [(videos / "Archery" / "v_Archery_g08_c01.avi", 0)]
    with pytest.raises(FileNotFoundError, match="testlist02.txt"):
        VideoDataset.ucf101(videos, splits, fold=2)


def kinetics_csv(path, *rows, header="label,youtube_id,time_start,time_end,split"):
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def test_kinetics(tmp_path):
    annotations = kinetics_csv(
        tmp_path / "val.csv",
        '"petting animal (not cat)",-1bcdefghij,4,14,val',
        "air drumming,A0cdefghijk,112,122,val",
        "zumba,Z0cdefghijk,0,10,train",
        "abseiling,0abcdefghij,7,17,val",
    )
    videos = tmp_path / "videos"
    for name in (
        "petting animal (not cat)/-1bcdefghij_000004_000014.mp4",
        "air_drumming/A0cdefghijk_000112_000122.mp4",
        "0abcdefghij_000007_000017.mp4",
    ):
        write(videos / name)
    dataset = VideoDataset.kinetics400(videos, annotations, split="val", sampling=SMALL)
    assert dataset.classes == ("abseiling", "air drumming", "petting animal (not cat)")
    assert [sample.label for sample in dataset.samples] == [2, 1, 0]
    batches = list(load(dataset, 3))
    assert batches[0].clips.shape == (3, 3, 4, 24, 24) and not dataset.skipped
    classes = ["zumba", *dataset.classes]
    assert VideoDataset.kinetics400(videos, annotations, classes=classes).samples[2].label == 0
    for wrong in (["zumba", "zumba"], ["zumba", ""]):
        with pytest.raises(ValueError, match="classes must be names, none blank and none twice"):
            VideoDataset.kinetics400(videos, annotations, classes=[*dataset.classes, *wrong])
    with pytest.raises(ValueError, match="label 'zumba' is none of the 3 classes"):
        VideoDataset.kinetics400(videos, annotations, classes=dataset.classes)
    with pytest.raises(ValueError, match="no rows of split 'test'"):
        VideoDataset.kinetics400(videos, annotations, split="test")


def something(tmp_path, entries, labels):
    paths = tmp_path / "something-something-v2-validation.json", tmp_path / "labels.json"
    for path, content in zip(paths, (entries, labels), strict=True):
        path.write_text(json.dumps(content), encoding="utf-8")
    return paths


def entry(name="7", template="Holding [something] next to [something]"):
    return {"id": name, "label": "holding a cup", "template": template, "placeholders": ["a cup"]}


HOLDING = {"Holding something next to something": "1", "Approaching something": "0"}


def test_something_something(tmp_path):
    write(tmp_path / "videos" / "7.webm")
    paths = something(tmp_path, [entry(), entry("8", "Approaching [something]")], HOLDING)
    dataset = VideoDataset.something_something_v2(tmp_path / "videos", *paths, sampling=SMALL)
    assert dataset.classes == ("Approaching something", "Holding something next to something")
    assert [(sample.path.name, sample.label) for sample in dataset.samples] == [("7.webm", 1), ("8.webm", 0)]
    assert dataset[0][0].shape == (3, 4, 24, 24)


# Which frames and pixels


@pytest.mark.parametrize(
    "total, place, expected",
    [
        (13, 0.5, [3, 5, 7, 9]),
        (13, 0.0, [0, 2, 4, 6]),
        (13, 0.9999, [6, 8, 10, 12]),
        (7, 0.5, [0, 2, 4, 6]),
        (5, 0.9, [0, 2, 4, 4]),
        (2, 0.5, [0, 1, 1, 1]),
    ],
)
def test_sampled_frames(total, place, expected):
    assert SMALL.indices(total, place) == expected


def test_places_outside_a_video_are_refused():
    for place in (-1.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="place must be .* got"):
            SMALL.indices(13, place)
    with pytest.raises(TypeError, match="place must be a number, got str"):
        SMALL.indices(13, "0.5")
    with pytest.raises(ValueError, match="total must be 1 or more, got 0"):
        SMALL.indices(0)


@pytest.mark.parametrize("frames, expected", [(13, [3, 5, 7, 9]), (4, [0, 2, 3, 3])])
def test_short_videos_repeat_their_last_frame(tmp_path, frames, expected):
    write(tmp_path / "a.mp4", frames=frames)
    dataset = VideoDataset([(tmp_path / "a.mp4", 0)], ["a"], sampling=SMALL)
    assert frames_of(dataset[0][0]) == expected


@pytest.mark.parametrize("height, width", [(48, 64), (64, 48), (20, 120)])
def test_the_center_is_cut(tmp_path, height, width):
    with VideoWriter(tmp_path / "a.mp4", height=height, width=width, rate=25) as writer:
        ramp = torch.linspace(0, 255, width).expand(3, height, width).to(torch.uint8)
        for _ in range(3):
            writer.write(ramp)
    clip, _ = VideoDataset([(tmp_path / "a.mp4", 0)], ["a"], sampling=SMALL)[0]
    assert clip.shape == (3, 4, 24, 24) and 0 <= clip.min() <= clip.max() <= 1
    columns = clip.mean((0, 1, 2))
    assert columns.mean() == pytest.approx(0.5, abs=0.02)
    share = 24 / 32 * min(height, width) / width  # of the width
    assert columns[-1] - columns[0] == pytest.approx(share * 23 / 24, abs=0.03)


def test_the_fields_defaults():
    assert ClipSampling() == ClipSampling(frames=32, stride=2, resize=256, crop=224)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"frames": 0}, "frames must be 1 or more, got 0"),
        ({"stride": 1.5}, "stride must be an int, got 1.5"),
        ({"resize": 33, "crop": 32}, "even number of 16 pixels or more, got 33"),
        ({"resize": 32, "crop": 64}, "crop 64 is more than resize 32"),
    ],
)
def test_bad_sampling(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ClipSampling(**options)


# Loading


@pytest.fixture
def damaged(tmp_path):
    """Six videos, the second truncated and the fourth missing."""
    samples = [(write(tmp_path / f"{i}.mp4", frames=30), i % 3) for i in range(6)]
    path = samples[1][0]
    path.write_bytes(path.read_bytes()[:700])
    samples[3][0].unlink()
    return VideoDataset(samples, ["a", "b", "c"], sampling=SMALL)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_files_are_skipped_and_told(damaged, workers):
    with pytest.warns(UserWarning) as told:
        batches = list(load(damaged, 2, workers))
    assert [batch.indices.tolist() for batch in batches] == [[0], [2], [4, 5]]
    assert [batch.labels.tolist() for batch in batches] == [[0], [2], [1, 2]]
    assert [tuple(batch.clips.shape) for batch in batches] == [(n, 3, 4, 24, 24) for n in (1, 1, 2)]
    assert all(isinstance(batch, Batch) and 0 <= batch.clips.min() <= batch.clips.max() <= 1 for batch in batches)
    broken, missing = (damaged.samples[i].path for i in (1, 3))
    assert set(damaged.skipped) == {broken, missing}
    assert "is damaged" in damaged.skipped[broken] and "there is no file" in damaged.skipped[missing]
    assert sum(len(batch.clips) for batch in batches) + len(damaged.skipped) == len(damaged)
    messages = [str(warning.message) for warning in told if "skipped" in str(warning.message)]
    assert len(messages) == 2 and str(broken) in messages[0] and str(missing) in messages[1]


@pytest.mark.parametrize("at", [0, 2])
def test_a_decoder_of_torchcodecs_that_fails_midway_skips_its_file(tmp_path, monkeypatch, at):
    """Its errors are RuntimeErrors of several lines."""
    paths = [write(tmp_path / name, frames=30) for name in ("a.mp4", "b.mp4", "c.mp4")]
    dataset = VideoDataset([(path, 0) for path in paths], ["a"], sampling=SMALL)
    decoded = sources.read_frames

    def read_frames(video, size):
        for i, frame in enumerate(decoded(video, size)):
            if video.path == paths[1] and i == at:
                raise RuntimeError("Could not receive frame from decoder: Invalid data\nException raised from C++")
            yield frame

    monkeypatch.setattr(sources, "read_frames", read_frames)
    with pytest.warns(UserWarning, match="skipped .*b.mp4: Could not receive frame from decoder: Invalid data$"):
        (batch,) = load(dataset, 3)
    assert batch.indices.tolist() == [0, 2] and list(dataset.skipped) == [paths[1]]


def test_nothing_readable_yields_nothing(damaged):
    with pytest.warns(UserWarning, match="skipped"):
        assert list(load(damaged, 4, indices=[1, 3])) == []
    assert len(damaged.skipped) == 2


def test_items_of_unreadable_files_raise(damaged):
    with pytest.raises(ValueError, match="is damaged"):
        damaged[1]
    with pytest.raises(FileNotFoundError, match="there is no file"):
        damaged[3]


def test_random_starts_follow_the_generator_alone(damaged):
    def starts(seed, workers, batch_size):
        generator = torch.Generator().manual_seed(seed)
        batches = load(damaged, batch_size, workers, indices=[5, 0, 4, 2], generator=generator)
        return torch.cat([batch.clips for batch in batches])

    first = starts(1, 0, 1)
    assert torch.equal(first, starts(1, 2, 3)) and not torch.equal(first, starts(2, 0, 1))
    assert len({tuple(frames_of(clip[:, :1])) for clip in first}) > 1


def test_load_refuses(damaged):
    for options, message in (
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"batch_size": 2, "workers": -1}, "workers must be 0 or more, got -1"),
        ({"batch_size": 2, "indices": [0, 6]}, "indices are 0 to 6; accepted: 0 to 5"),
    ):
        with pytest.raises(ValueError, match=message):
            load(damaged, **options)
    with pytest.raises(TypeError, match="generator must be a torch.Generator on the CPU, got int"):
        load(damaged, 2, generator=0)
    with pytest.raises(TypeError, match="must be a VideoDataset, got list"):
        load([], 2)


def test_bad_lists(tmp_path):
    with pytest.raises(ValueError, match="no videos"):
        VideoDataset([], ["a"])
    for label in (2, -1, "0", True):
        with pytest.raises(ValueError, match=r"a.mp4 has label .*; accepted: 0 to 1"):
            VideoDataset([(tmp_path / "a.mp4", label)], ["a", "b"])
    with pytest.raises(TypeError, match="must be a ClipSampling, got dict"):
        VideoDataset([(tmp_path / "a.mp4", 0)], ["a"], sampling={"frames": 2})


# Bad annotation files


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "testlist01.txt lists no videos"),
        ("\r\n\n  \n", "lists no videos"),
        ("Knitting/v_Knitting_g01_c01.avi\n", "Knitting/v_Knitting_g01_c01.avi is in no class"),
        ("Archery/v_Archery_g01_c01.avi 2\n", "has label 2, its class 1"),
        ("Archery/../../secret.avi\n", r"'Archery/../../secret.avi' leads out of"),
        ("/etc/passwd\n", "'/etc/passwd' leads out of"),
        ("Archery\\..\\..\\secret.avi\n", "leads out of"),
        ("C:\\secret.avi\n", "leads out of"),
        ("Archery/a\0b.avi\n", "leads out of"),
        ("..\n", r"'\.\.' leads out of"),
    ],
)
def test_bad_ucf101_lists(ucf, content, message):
    videos, splits = ucf
    (splits / "testlist01.txt").write_text(content)
    with pytest.raises(ValueError, match=message):
        VideoDataset.ucf101(videos, splits)


@pytest.mark.parametrize(
    "content, message",
    [
        ("Archery\n", "lines of a number and a class"),
        ("1 Archery\n3 Kayaking\n", "without gaps"),
        ("1 Archery\n2 Archery\n", "each once"),
        ("0 Archery\n", "without gaps"),
    ],
)
def test_bad_ucf101_classes(ucf, content, message):
    videos, splits = ucf
    (splits / "classInd.txt").write_text(content)
    with pytest.raises(ValueError, match=message):
        VideoDataset.ucf101(videos, splits)


def test_ucf101_options(ucf):
    videos, splits = ucf
    for options in ({"split": "val"}, {"fold": 4}):
        with pytest.raises(ValueError, match="accepted: train or test, and 1, 2 or 3"):
            VideoDataset.ucf101(videos, splits, **options)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        VideoDataset.ucf101(videos / "nowhere", splits)


def test_repeated_lines_count_once(ucf):
    videos, splits = ucf
    name = "Archery/v_Archery_g01_c01.avi"
    (splits / "testlist01.txt").write_text(f"{name}\nBaseballPitch/v_Base_g01_c01.avi\n{name}\n{name}\n")
    with pytest.warns(UserWarning, match="repeats 2 of its videos; each counts once") as told:
        dataset = VideoDataset.ucf101(videos, splits)
    assert len(dataset) == 2 and told[0].filename == __file__


def test_two_labels_for_one_video_are_refused(tmp_path):
    rows = ["abseiling,0abcdefghij,7,17,val", "zumba,0abcdefghij,7,17,val"]
    with pytest.raises(ValueError, match="two labels, 0 and 1"):
        VideoDataset.kinetics400(tmp_path, kinetics_csv(tmp_path / "val.csv", *rows))


def test_line_ends_marks_and_foreign_names(ucf):
    videos, splits = ucf
    name = "Kayaking été/v_漕ぐ g01\u2028c01.avi"
    write(videos / name)
    (splits / "classInd.txt").write_bytes("\ufeff1 Archery\r\n2 BaseballPitch\r\n3 Kayaking été\r\n".encode())
    (splits / "trainlist01.txt").write_bytes(f"Archery/v_Archery_g08_c01.avi 1\r\n{name} 3\r\n".encode())
    dataset = VideoDataset.ucf101(videos, splits, split="train", sampling=SMALL)
    assert dataset.classes[2] == "Kayaking été"
    assert [batch.labels.tolist() for batch in load(dataset, 2)] == [[0, 2]] and not dataset.skipped


@pytest.mark.parametrize(
    "row, message",
    [
        ("abseiling,../../secret,7,17,val", "leads out of"),
        ("abseiling,/etc/passwd,7,17,val", "leads out of"),
        ("../..,0abcdefghij,7,17,val", r"'\.\./\.\.' leads out of"),
        (",0abcdefghij,7,17,val", "'' leads out of"),
        ("abseiling,0abcdefghij,seven,17,val", "from 'seven' to '17' seconds"),
        ("abseiling,0abcdefghij,-7,17,val", "from '-7'"),
        ("abseiling,0abcdefghij,7,1e99,val", "to '1e99' seconds"),
        ("abseiling,0abcdefghij,7", "row 1 has more or fewer values"),
        ("abseiling,0abcdefghij,7,17,val,more", "row 1 has more or fewer values"),
        ('abseiling,"0abcdefghij,7,17,val', "is not CSV"),
        ("a" * 200_000 + ",0abcdefghij,7,17,val", "is not CSV"),
    ],
)
def test_bad_kinetics_rows(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        VideoDataset.kinetics400(tmp_path, kinetics_csv(tmp_path / "val.csv", row))


def test_bad_kinetics_files(tmp_path):
    with pytest.raises(ValueError, match="has no rows"):
        VideoDataset.kinetics400(tmp_path, kinetics_csv(tmp_path / "val.csv"))
    test_csv = kinetics_csv(tmp_path / "test.csv", "0abc,1,2,test", header="youtube_id,time_start,time_end,split")
    with pytest.raises(ValueError, match="accepted: label, time_end, time_start, youtube_id"):
        VideoDataset.kinetics400(tmp_path, test_csv)
    long_name = kinetics_csv(tmp_path / "long.csv", f"{'a' * 5000},0abcdefghij,7,17,val")
    dataset = VideoDataset.kinetics400(tmp_path, long_name)
    with pytest.warns(UserWarning, match="skipped"):
        assert not list(load(dataset, 1))


@pytest.mark.parametrize(
    "entries, labels, message",
    [
        ([], HOLDING, "lists no videos"),
        ({"id": "7"}, HOLDING, "holds a dict; accepted: a list"),
        ([{"id": "7"}], HOLDING, "entry 0 must have the texts id and template"),
        ([entry(7)], HOLDING, "entry 0 must have the texts"),
        (["7"], HOLDING, "entry 0 must have the texts"),
        ([entry("7", "Eating [something]")], HOLDING, "7 has the template 'Eating something', which is not in"),
        ([entry("../7")], HOLDING, "'../7.webm' leads out of"),
        ([entry("/7")], HOLDING, "leads out of"),
        ([entry()], [], "holds a list; accepted: a dict"),
        ([entry()], {**HOLDING, "Approaching something": "2"}, "without gaps"),
        ([entry()], {**HOLDING, "Approaching something": 0}, "a number as a text"),
    ],
)
def test_bad_something_something(tmp_path, entries, labels, message):
    with pytest.raises(ValueError, match=message):
        VideoDataset.something_something_v2(tmp_path, *something(tmp_path, entries, labels))


@pytest.mark.parametrize("content", [b"[" * 100_000, b"{", b"\xff\xfe[]", b"[" + b"9" * 5000 + b"]"])
def test_annotations_that_are_no_json(tmp_path, content):
    annotations, labels = something(tmp_path, [], HOLDING)
    annotations.write_bytes(content)
    with pytest.raises(ValueError, match="validation.json is not"):
        VideoDataset.something_something_v2(tmp_path, annotations, labels)


def test_annotations_are_bounded(ucf, monkeypatch):
    videos, splits = ucf
    monkeypatch.setattr(annotations, "MAX_ANNOTATIONS", 30)
    with pytest.raises(ValueError, match="classInd.txt is too large; accepted: annotations of 30 bytes at most"):
        VideoDataset.ucf101(videos, splits)


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no links here")
def test_links_of_ones_own_are_followed(ucf, tmp_path):
    videos, splits = ucf
    (videos / "Archery").rename(tmp_path / "elsewhere")
    (videos / "Archery").symlink_to(tmp_path / "elsewhere")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(next(load(VideoDataset.ucf101(videos, splits, sampling=SMALL), 2)).clips) == 2


def test_seeds_draw_videos_of_their_own(tmp_path):
    paths = [write(tmp_path / f"{i}.avi", level=20 * i) for i in range(7)]
    dataset = VideoDataset([(path, i) for i, path in enumerate(paths)], "abcdefg", sampling=SMALL)
    draw = draws(dataset, 3)
    halves = [draw(0, 0, 2), draw(0, 2, 1), draw(1, 0, 3)]
    labels = torch.cat([labels for _, labels in halves]).tolist()
    assert len(set(labels)) == 6 and labels != sorted(labels)
    for clips, of_clips in halves:
        assert (clips.mean((1, 2, 3, 4)) * 255 / 20).round().tolist() == of_clips.tolist()
    assert torch.equal(draw(0, 0, 3)[1], torch.cat([halves[0][1], halves[1][1]]))
    with pytest.raises(ValueError, match="3 clips for each seed from 0 to 2 are more than the 7 videos"):
        draw(2, 0, 3)
    with pytest.raises(ValueError, match="a seed has 3 clips, but those from 1 to 4 were asked for"):
        draw(0, 1, 3)  # the last would be of seed 1
    with pytest.raises(ValueError, match="seed must be 0 or more, got -1"):
        draw(-1, 0, 3)
    with pytest.raises(ValueError, match="start must be 0 or more, got -1"):
        draw(0, -1, 2)
    with pytest.raises(ValueError, match="count must be 1 or more, got 0"):
        draw(0, 0, 0)
    with pytest.raises(ValueError, match="clips must be 1 or more, got -1"):
        draws(dataset, -1)


def test_a_draw_of_unreadable_videos_is_empty(tmp_path):
    dataset = VideoDataset([(tmp_path / "missing.avi", 0)], "a", sampling=SMALL)
    with pytest.warns(UserWarning, match="skipped"):
        clips, labels = draws(dataset, 1)(0, 0, 1)
    assert clips.shape == (0, 3, 4, 24, 24) and labels.shape == (0,) and labels.dtype == torch.int64
    assert list(dataset.skipped) == [tmp_path / "missing.avi"]
