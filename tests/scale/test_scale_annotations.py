import csv
import json

import pytest
from scale_files import done_row

from videopure_fast.data.annotations import read_lines
from videopure_fast.data.datasets import VideoDataset
from videopure_fast.scale.annotations import READ_BACK, write_annotations
from videopure_fast.scale.rows import Row
from videopure_fast.scale.sources import dataset_jobs


def ucf101(root):
    (root / "classInd.txt").write_text("1 Archery\n2 Kayaking\n")
    (root / "testlist01.txt").write_text("Kayaking/k 1.avi\nArchery/a.avi\nArchery/gone.avi\n")
    return VideoDataset.ucf101(root, root)


def kinetics400(root):
    with (root / "val.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["label", "youtube_id", "time_start", "time_end", "split"])
        table.writerows([["zumba, hip", "_a_1", 4, 14, "val"], ["air drumming", "b", 0, 10, "val"]])
        table.writerow(["abseiling", "gone", 0, 10, "val"])
    (root / "air_drumming").mkdir()
    return VideoDataset.kinetics400(root, root / "val.csv")


def something_something_v2(root):
    (root / "labels.json").write_text(json.dumps({"Moving something": "0", "Dropping something": "1"}))
    entries = [{"id": name, "template": "Dropping [something]"} for name in ("7", "3", "gone")]
    (root / "validation.json").write_text(json.dumps(entries))
    return VideoDataset.something_something_v2(root, root / "validation.json", root / "labels.json")


def read_back(kind, out):
    if kind == "ucf101":
        return VideoDataset.ucf101(out, out)
    if kind == "kinetics400":
        return VideoDataset.kinetics400(out, out / "annotations.csv", classes=read_lines(out / "classes.txt"))
    return VideoDataset.something_something_v2(out, out / "annotations.json", out / "labels.json")


MADE = {"ucf101": ucf101, "kinetics400": kinetics400, "something-something-v2": something_something_v2}


@pytest.mark.parametrize("kind", MADE)
def test_annotations_of_outputs_are_read_as_those_of_videos(tmp_path, kind):
    root, out = tmp_path / "in", tmp_path / "out"
    root.mkdir()
    dataset = MADE[kind](root)
    jobs = dataset_jobs(dataset, root, READ_BACK[kind][0])
    rows = [done_row(job) for job in jobs if "gone" not in job.name]
    rows += [Row(job.name, job.output, "failed") for job in jobs if "gone" in job.name]
    for job in jobs:
        (out / job.output).parent.mkdir(parents=True, exist_ok=True)
    write_annotations(kind, dataset, jobs, [], out)
    assert not [path for path in out.rglob("*") if path.is_file()]
    write_annotations(kind, dataset, jobs, rows[::-1], out)
    found = read_back(kind, out)
    assert found.classes == dataset.classes
    kept = [(job, label) for job, (_, label) in zip(jobs, dataset.samples, strict=True) if "gone" not in job.name]
    assert found.samples == [(out / job.output, label) for job, label in kept] and len(kept) == 2
