"""Refusals of annotation files say what was seen and what is accepted."""

import json
import re

import pytest

from videopure_fast.data.datasets import VideoDataset


def refused(message, make):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        make()
    assert "accepted" in str(caught.value) or "must" in str(caught.value)


@pytest.mark.parametrize(
    "listed, message",
    [
        ("ApplyEyeMakeup\\v_x.avi", "'ApplyEyeMakeup\\\\v_x.avi' has a backslash; accepted: paths with /"),
        ("v_x.avi", "'v_x.avi' is in no class's folder; accepted: <class>/<file>, with /"),
        ("applyeyemakeup/v_x.avi", "applyeyemakeup/v_x.avi is in no class of classInd.txt; accepted: 'ApplyEyeMakeup'"),
        ("Archery/v_x.avi 1", "Archery/v_x.avi has label 1, its class 2; accepted: the number of its class"),
        ("", "testlist01.txt lists no videos; accepted: one or more"),
    ],
)
def test_ucf101_lists(listed, message, tmp_path):
    (tmp_path / "classInd.txt").write_text("1 ApplyEyeMakeup\n2 Archery\n")
    (tmp_path / "testlist01.txt").write_text(f"{listed}\n")
    refused(message, lambda: VideoDataset.ucf101(tmp_path, tmp_path))


@pytest.mark.parametrize(
    "classes, message",
    [
        ("Archery 1\n", "classInd.txt must have lines of a number and a class, as 1 Archery, got 'Archery 1'"),
        ("0 Archery\n", "without gaps, and each once; 'Archery' has 0 where 1 is expected"),
        ("1 Archery\n3 Biking\n", "'Biking' has 3 where 2 is expected"),
        ("1 Archery\n1 Biking\n", "'Biking' has 1 where 2 is expected"),
        ("1 Archery\n2 Archery\n", "'Archery' is there 2 times"),
    ],
)
def test_ucf101_classes(classes, message, tmp_path):
    (tmp_path / "classInd.txt").write_text(classes)
    refused(message, lambda: VideoDataset.ucf101(tmp_path, tmp_path))


HEADER = "label,youtube_id,time_start,time_end,split\n"


@pytest.mark.parametrize(
    "text, message",
    [
        (
            f"{HEADER}abseiling,aaaaaaaaaaa,10.0,20.0,val\n",
            "is from '10.0' to '20.0' seconds; accepted: whole",
        ),
        (f"{HEADER}abseiling,aaaaaaaaaaa,,20,val\n", "from '' to '20' seconds; accepted: whole seconds, as 10 and 20"),
        (f"{HEADER}abseiling,aaaaaaaaaaa,10\n", "row 1 has more or fewer values than the header, 3; accepted: 5"),
        (f"{HEADER}a,b,1,2,val\na,b,1,2,val,,\n", "row 2 has more or fewer values than the header, 7; accepted: 5"),
        (HEADER, "val.csv has no rows"),
        ("", "val.csv is empty; accepted: label, time_end, time_start, youtube_id, and perhaps others"),
        ("label,id\nx,y\n", "val.csv has the columns label, id; accepted: label, time_end, time_start, youtube_id"),
        (f"{HEADER}a,..\\b,1,2,val\n", "leads out of"),
        (f"{HEADER}a,b\\c,1,2,val\n", "has a backslash; accepted: paths with /"),
    ],
)
def test_kinetics(text, message, tmp_path):
    (tmp_path / "val.csv").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        VideoDataset.kinetics400(tmp_path, tmp_path / "val.csv")


def test_kinetics_splits_and_classes(tmp_path):
    (tmp_path / "val.csv").write_text(f"{HEADER}air drumming,aaaaaaaaaaa,1,2,val\nzumba,bbbbbbbbbbb,1,2,train\n")

    def read(**options):
        return VideoDataset.kinetics400(tmp_path, tmp_path / "val.csv", **options)

    refused(
        "has no rows of split 'test'; accepted: 'train', 'val'",
        lambda: read(split="test"),
    )
    classes = ["air_drumming", "a", "b", "c", "d", "zumba"]
    message = "label 'air drumming' is none of the 6 classes; accepted: 'air_drumming', 'a', 'b', 'c', and 2 more"
    refused(message, lambda: read(classes=classes))
    for wrong, seen in ((["a", "a"], "'a'"), (["a", " "], "' '")):
        refused(
            f"none blank and none twice, got {seen}",
            lambda wrong=wrong: read(classes=wrong),
        )
    with pytest.raises(TypeError, match="classes must be names, got 3; accepted: a text for each label"):
        read(classes=["a", 3])
    (tmp_path / "val.csv").write_text("label,youtube_id,time_start,time_end\na,b,1,2\n")
    refused("accepted: None, since no row states a split", lambda: read(split="val"))


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"id": 78687, "template": "T"}, "entry 0 must have the texts id and template, got id 78687, of type int"),
        ({"id": "1", "template": None}, "got template None, of type NoneType"),
        ({"id": "1", "label": "x"}, "entry 0 must have the texts id and template, got 'id', 'label'"),
        ({}, "entry 0 must have the texts id and template, got nothing"),
        ("78687", "entry 0 must have the texts id and template, got '78687', of type str"),
        ({"id": "1", "template": "Turning [x] up"}, "1 has the template 'Turning x up', which is not in"),
        ({"id": "1", "template": "Turning [x] up"}, "; accepted: 'Turning x upside down'"),
        ({"id": ["9"] * 100, "template": "T"}, "..., of type list"),
    ],
)
def test_something_something(entry, message, tmp_path):
    (tmp_path / "val.json").write_text(json.dumps([entry]))
    (tmp_path / "labels.json").write_text('{"Turning x upside down": "0"}')
    refused(
        message, lambda: VideoDataset.something_something_v2(tmp_path, tmp_path / "val.json", tmp_path / "labels.json")
    )


@pytest.mark.parametrize(
    "labels, message",
    [
        ({"a": 0}, "must give each template a number as a text, as \"0\"; 'a' has 0, of type int"),
        ({"a": "zero"}, "'a' has 'zero', of type str"),
        ({"a": "0", "b": "2"}, "must number its classes without gaps, and each once; 'b' has 2 where 1 is expected"),
        ({"a": None}, "'a' has None, of type NoneType"),
    ],
)
def test_something_somethings_labels(labels, message, tmp_path):
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    refused(
        message, lambda: VideoDataset.something_something_v2(tmp_path, tmp_path / "val.json", tmp_path / "labels.json")
    )
