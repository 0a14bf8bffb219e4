"""A classifier's contract in an evaluation: class names, dtype, layout; and data sets taken as they are."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import Classifier, build_purifier, clips
from torch import nn

from videopure_fast.adapters import VideoClassifier, load_classifier
from videopure_fast.data.mapped import MappedDataset
from videopure_fast.evaluation import benchmark, standard_threat
from videopure_fast.evaluation.classifier import align_classifier

CLIPS = clips(6, 3, 4, 16, 16)
PLAIN = Classifier().eval().requires_grad_(False)
LABELS = PLAIN(CLIPS).argmax(-1)
QUICK = {"eps": 8 / 255, "checks": False, "progress": False, "defenses": ["none", "mean of 3 frames"]}
QUICK |= {"threats": [standard_threat("gray-box", 9, steps=2)]}


@pytest.fixture(scope="module")
def purifier():
    return build_purifier()


class Named(nn.Module):
    """The plain classifier with its labels in another order, and names."""

    def __init__(self, order, names):
        super().__init__()
        self.plain, self.order = PLAIN, order
        self.config = SimpleNamespace(id2label=dict(enumerate(names)))
        self.eval()

    def forward(self, x):
        logits = self.plain(x)
        unknown = logits.new_full((len(x), 1), -100.0)
        return torch.cat([logits, unknown], 1)[:, self.order]


def outcomes(report):
    return {name: entry["right"] for name, entry in report.record.entries.items()}


@pytest.mark.parametrize(
    "order, names",
    [
        ([0, 1, 2], ["ApplyEyeMakeup", "HandstandPushups", "yo yo"]),
        ([2, 0, 1], ["yo-yo", "apply eye makeup", "handstand_pushups"]),
        ([1, 2, 0], ["HANDSTAND PUSHUPS", "YoYo", "Apply_Eye_Makeup"]),
        ([3, 2, 3, 1, 0], ["archery", "yo yo", "bowling", "handstand pushups", "apply eye makeup"]),  # knows more
        ([0, 1, 2], ["LABEL_0", "LABEL_1", "LABEL_2"]),
    ],
)
def test_labels_are_put_into_the_order_of_the_data_set(order, names, purifier):
    classes = ["ApplyEyeMakeup", "HandstandPushups", "YoYo"]
    expected = benchmark(PLAIN, purifier, CLIPS, LABELS, classes=classes, **QUICK)
    assert expected.rows[0].accuracy == 1
    named = Named(order, names)
    report = benchmark(named, purifier, CLIPS, LABELS, classes=classes, **QUICK)
    assert outcomes(report) == outcomes(expected)
    assert list(report.classes)[:3] == classes and len(report.classes) == len(names)
    logits = report.context.classifier(CLIPS)
    assert torch.equal(logits[:, :3], PLAIN(CLIPS)) and logits.shape == (6, len(names))
    orders = None if report.context.classifier is named else [list(align(named, classes).order), None]
    assert json.loads(report.record.plan.source).get("labels") == orders
    surrogate = Named([2, 0, 1], ["c", "a", "b"])
    transfer = QUICK | {"threats": ["transfer"], "classes": ["a", "b", "c"]}
    found = [benchmark(PLAIN, purifier, CLIPS, LABELS, surrogate=s, **transfer) for s in (PLAIN, surrogate)]
    assert outcomes(found[0]) == outcomes(found[1])


def align(classifier, classes):
    return align_classifier("classifier", classifier, CLIPS, classes)


def test_a_surrogate_has_the_classifiers_labels_where_the_data_have_no_names():
    named, surrogate = Named([0, 1, 2], ["a", "b", "c"]), Named([2, 0, 1], ["c", "a", "b"])
    options = QUICK | {"threats": ["transfer"]}
    purifier = build_purifier()
    found = [benchmark(named, purifier, CLIPS, LABELS, surrogate=s, **options) for s in (named, surrogate)]
    assert outcomes(found[0]) == outcomes(found[1])
    with pytest.raises(ValueError, match=r"the surrogate \(Named\) has other classes: label 1 of the data set, 'b'"):
        benchmark(named, purifier, CLIPS, LABELS, surrogate=Named([0, 1], ["a", "x"]), **options)


@pytest.mark.parametrize(
    "names, classes, message",
    [
        (
            ["a", "b", "c"],
            ["a", "x", "c"],
            "'x', is none of the classifier's classes (its label 1 is 'b')",
        ),
        (["a", "b", "c"], ["a", "b", "c", "d"], "3 of the data set's 4 classes are among the classifier's 3"),
        (["a b", "A_B", "c"], ["ab", "c"], "the classifier's 'a b' and 'A_B' both fit the class 'ab'"),
        (
            ["LABEL_0", "LABEL_1", "LABEL_2"],
            ["a", "b"],
            "returns (6, 3) for 6 clips; accepted: logits (6, 2)",
        ),
        (["a", "b"], ["a", "b"], "returns (6, 3) for 6 clips; accepted: logits (6, 2)"),
    ],
)
def test_other_classes_are_refused(names, classes, message):
    named = Named([0, 1, 2], names)
    with pytest.raises(ValueError, match=re.escape(message)):
        align(named, classes)


def test_a_transformers_folder_in_another_order(tmp_path, purifier):
    """The model's own names say that its label 0 is the data set's label 1."""
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    names = ["ApplyEyeMakeup", "HandstandPushups"]
    sizes = {"image_size": 32, "patch_size": 16, "num_frames": 4, "hidden_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "intermediate_size": 16, "id2label": dict(enumerate(reversed(names)))}
    VideoMAEForVideoClassification(VideoMAEConfig(**sizes, **heads)).save_pretrained(tmp_path)
    model = load_classifier(str(tmp_path), mean=(0.5,) * 3, std=(0.5,) * 3)
    found = align(model, names)
    assert found.order == (1, 0) and found.classes == ("ApplyEyeMakeup", "HandstandPushups")
    assert torch.equal(found.classifier(CLIPS), model(CLIPS).flip(1))
    labels = 1 - model(CLIPS).argmax(-1)
    report = benchmark(model, purifier, CLIPS, labels, classes=names, **QUICK)
    assert report.rows[0].accuracy == 1
    with pytest.raises(ValueError, match="has other classes: label 1 of the data set, 'Archery'"):
        align(model, ["ApplyEyeMakeup", "Archery"])


@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16, torch.float64])
def test_classifiers_of_other_dtypes_are_evaluated(weights):
    classifier = Classifier().to(weights).eval()
    labels = classifier(CLIPS.to(weights)).argmax(-1)
    options = QUICK | {"threats": ["bpda", standard_threat("exact", 2, steps=1)], "defenses": ["none", "videopure"]}
    report = benchmark(classifier, build_purifier(inversion_steps=0), CLIPS[:2], labels[:2], **options)
    assert report.rows[0].accuracy == 1 and report.context.classifier(CLIPS).dtype in (torch.float32, weights)
    logits = report.context.classifier(CLIPS)
    assert torch.equal(logits, classifier(CLIPS.to(weights)).to(logits.dtype))


@pytest.mark.parametrize("kind", ["uint8", "float16", "bfloat16", "float64"])
def test_clips_of_other_dtypes_are_evaluated(kind, purifier):
    given = CLIPS.mul(255).byte() if kind == "uint8" else CLIPS.to(getattr(torch, kind))
    floats = given.float() / 255 if kind == "uint8" else given.float()
    report = benchmark(PLAIN, purifier, given, LABELS, **QUICK)
    assert outcomes(report) == outcomes(benchmark(PLAIN, purifier, floats, LABELS, **QUICK))


class Frames(nn.Module):
    """(B, F, 3, H, W) -> 3 logits."""

    def forward(self, x):
        assert x.shape[2] == 3, f"{x.shape[2]} channels"
        return PLAIN(x.transpose(1, 2))


def test_classifiers_of_another_format_are_told_their_adapter(purifier):
    with pytest.raises(
        ValueError,
        match=r"(?s)the classifier \(Frames\) fails on clips \(2, 3, 4, 16, 16\): AssertionError: 4 channels.*; "
        r"it takes \(B, F, 3, H, W\): adapters.VideoClassifier\(model, layout='BTCHW'\) adapts it",
    ):
        benchmark(Frames().eval(), purifier, CLIPS, LABELS, **QUICK)
    adapted = VideoClassifier(Frames(), layout="BTCHW").eval()
    found = benchmark(adapted, purifier, CLIPS, LABELS, **QUICK)
    assert outcomes(found) == outcomes(benchmark(PLAIN, purifier, CLIPS, LABELS, **QUICK))


def test_map_style_data_sets_are_taken_as_they_are(purifier):
    class Mine:
        classes = ("x", "y", "z")

        def __len__(self):
            return len(CLIPS)

        def __getitem__(self, index):
            return {"video": CLIPS[index], "label": int(LABELS[index])}

    pairs = list(zip(CLIPS, LABELS, strict=True))
    for given, classes in ((Mine(), Mine.classes), (pairs, None), (MappedDataset(Mine()), Mine.classes)):
        report = benchmark(PLAIN, purifier, given, **QUICK)
        assert report.rows[0].accuracy == 1 and {row.n for row in report.rows} == {6} and report.classes == classes
    assert benchmark(Named([1, 0, 2], ["Y", "X", "Z"]), purifier, Mine(), **QUICK).rows[0].accuracy == 1
    assert {row.n for row in benchmark(PLAIN, purifier, Mine(), seeds=2, **QUICK).rows} == {6}
    assert {row.n for row in benchmark(PLAIN, purifier, pairs[:2], **QUICK).rows} == {2}
    with pytest.raises(ValueError, match="1 x 7 clips are needed, and there are 6"):
        benchmark(PLAIN, purifier, Mine(), count=7, **QUICK)
    with pytest.raises(ValueError, match=r"item 0: video has shape \(4, 3, 16, 16\).*looks like \(B, F, 3, H, W\)"):
        benchmark(PLAIN, purifier, [(clip.transpose(0, 1), 0) for clip in CLIPS], **QUICK)
    with pytest.raises(TypeError, match="clips are a dict; accepted: a tensor with labels"):
        benchmark(PLAIN, purifier, {"train": Mine()}, **QUICK)
