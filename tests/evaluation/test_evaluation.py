"""Evaluations: what is drawn, written down, resumed and counted."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import Classifier, build_purifier, clips
from torch import Tensor, nn

from videopure_fast.attacks import pgd
from videopure_fast.attacks.base import majority_vote
from videopure_fast.defense import build_defenses, defense_names
from videopure_fast.evaluation.plan import Plan, Threat
from videopure_fast.evaluation.record import Record
from videopure_fast.evaluation.runner import EvalContext, evaluate, examples
from videopure_fast.evaluation.tables import inaccessible, outcome, rescued, table, wilson_interval

STEPS = {"steps": 2, "step_size": 2 / 255}
CLEAN, GRAY, EXACT = Threat("none", clips=5), Threat("gray-box", "pgd", STEPS, 5), Threat("exact", "pgd", STEPS, 3)
BPDA, QUERY = Threat("bpda", "pgd", STEPS, 5), Threat("query", "square", {"queries": 3}, 3)
TRANSFER = Threat("transfer", "pgd", STEPS, 5)
NAME, ENTRY = "clean | 0/255 | seed 0 | 0 | none", {"right": [1], "repeats": 1, "seconds": 1.0, "peak_bytes": None}


CLASSIFIER, SURROGATE = (Classifier(seed).eval().requires_grad_(False) for seed in (1, 2))


def draw(seed: int, start: int, count: int) -> tuple[Tensor, Tensor]:
    """Labeled as the classifier sees them."""
    drawn = torch.stack([clips(3, 4, 16, 16, seed=1000 * seed + start + i) for i in range(count)])
    return drawn, CLASSIFIER(drawn).argmax(-1)


def plan(*threats: Threat, names: tuple[str, ...] = ("none", "mean of 3 frames", "ddim", "videopure")) -> Plan:
    return Plan("test", threats, names, eps=(8 / 255,), seeds=(0, 1), batch=3, repeats=2)


def counts(record: Record) -> dict[str, list[int] | None]:
    return {name: batch["right"] for name, batch in record.entries.items()}


@pytest.fixture(scope="module")
def available():
    return build_defenses(build_purifier(), depths=(2,))


@pytest.fixture(scope="module")
def whole(available, tmp_path_factory):
    """An evaluation with nothing in its way."""
    path = tmp_path_factory.mktemp("whole") / "record.json"
    threats = (CLEAN, GRAY, TRANSFER, BPDA, EXACT, QUERY)
    return evaluate(plan(*threats), EvalContext(CLASSIFIER, available, draw, SURROGATE), path)


def test_every_defense_of_the_comparison_is_there(available):
    assert tuple(available) == defense_names((2,))
    assert {"none", "VAE round trip", "JPEG 75", "H.264 crf 23", "mean of 5 frames", "median of 3 frames"} <= set(
        available
    )
    for suffix in ("", ", T=2"):
        names = ("ddpm", "ddim", "ddim_inversion", "videopure")
        variants = ("videopure without guidance", "videopure without voting", "videopure with feedback")
        assert {name + suffix for name in (*names, *variants)} <= set(available)
    x = clips(2, 3, 4, 16, 16)
    for name, defense in available.items():
        if not name.startswith("ddpm"):
            votes = defense.votes(x, torch.Generator().manual_seed(0))
            assert votes.shape == (2, votes.shape[1], *x.shape[1:]), name
            assert votes.shape[1] == {"videopure": 3, "videopure with feedback, T=2": 4}.get(name, votes.shape[1])
    assert {name for name, defense in available.items() if defense.randomized} == {
        "ddpm",
        "ddim",
        "ddpm, T=2",
        "ddim, T=2",
    }


def test_a_batch_is_the_attack_and_the_vote(whole):
    batch = next(
        batch for batch in whole.plan.batches() if batch.threat == GRAY and batch.seed == 1 and batch.start == 3
    )
    assert batch.clips == 2
    x, labels = draw(1, 3, 2)
    attacked = pgd(CLASSIFIER, x, labels, eps=8 / 255, generator=batch.generator("attack "), **STEPS)
    expected = (majority_vote(CLASSIFIER(attacked)) == labels).long().tolist()
    assert whole.entries[batch.name("none")]["right"] == expected


def test_clean_clips_are_right_without_a_defense(whole):
    row = next(row for row in table(whole) if (row.threat, row.defense) == ("clean", "none"))
    assert (row.n, row.accuracy, row.worst, row.eps) == (10, 1, 1, 0)
    assert (row.low, row.high) == wilson_interval(1.0, 10)
    assert row.seconds_per_clip > 0


@pytest.mark.parametrize("after", [1, 10, 19])
def test_an_evaluation_that_was_cut_off_ends_with_the_same_table(after, whole, available, tmp_path):
    """In the middle of a batch: its first defense is done, its second is not."""
    path, calls = tmp_path / "sub" / "record.json", []

    def cut(*arguments):
        calls.append(arguments)
        if len(calls) > after:
            raise KeyboardInterrupt
        return available["mean of 3 frames"].votes(*arguments)

    short = available | {"mean of 3 frames": replace(available["mean of 3 frames"], votes=cut)}
    with pytest.raises(KeyboardInterrupt):
        evaluate(whole.plan, EvalContext(CLASSIFIER, short, draw, SURROGATE), path)
    assert 0 < len(Record(path, whole.plan).entries) < len(whole.entries)
    resumed = evaluate(whole.plan, EvalContext(CLASSIFIER, available, draw, SURROGATE), path)
    assert counts(resumed) == counts(whole) == counts(Record(path, whole.plan))
    same = [row._replace(seconds_per_clip=0, peak_bytes=0) for row in table(resumed)]
    assert same == [row._replace(seconds_per_clip=0, peak_bytes=0) for row in table(whole)]
    assert [file.name for file in path.parent.iterdir()] == ["record.json"]


def test_what_a_defense_meets_does_not_depend_on_the_others(whole, available, tmp_path):
    alone = evaluate(
        plan(GRAY, BPDA, names=("ddim",)), EvalContext(CLASSIFIER, available, draw), tmp_path / "record.json"
    )
    assert counts(alone).items() <= counts(whole).items()


def test_rows_count_clips_repeats_and_the_minimum_over_adaptive_attacks(tmp_path):
    record = Record(tmp_path / "record.json", plan(BPDA, EXACT, names=("videopure", "ddim")))
    for batch in record.plan.batches():
        cost = {"seconds": 1.0, "peak_bytes": 5}
        right = [1, 0, 1][: batch.clips] if batch.threat == BPDA else [0, 0, 1][: batch.clips]
        record.add(batch.name("videopure"), {"right": right, "repeats": 1, **cost})
        record.add(batch.name("ddim"), {"right": [4, 2, 0][: batch.clips], "repeats": 4, **cost})
    rows = {(row.threat, row.defense): row for row in table(record)}
    bpda, exact = (rows[threat.title, "videopure"] for threat in (BPDA, EXACT))
    assert (bpda.n, bpda.accuracy, exact.n, exact.accuracy) == (10, 0.6, 6, 1 / 3)
    worst = rows["minimum of bpda, exact", "videopure"]
    assert (worst.n, worst.accuracy) == (6, 1 / 3)
    assert worst.seconds_per_clip is None and BPDA.title == "bpda pgd, steps=2, step_size=2/255"
    ddim = rows[EXACT.title, "ddim"]
    assert (ddim.accuracy, ddim.worst, ddim.peak_bytes) == (0.5, 1 / 3, 5)
    assert ddim.seconds_per_clip == pytest.approx(1 / 3)


def test_the_luck_of_a_random_defense_is_no_attack(tmp_path):
    """Each attack leaves two of three clips by chance alone, never the same: one clip by clip would leave none."""
    records = []
    for i, threat in enumerate((BPDA, EXACT, GRAY)):
        record = Record(tmp_path / f"{i}.json", plan(threat, names=("ddim",)))
        for batch in record.plan.batches():
            right = [0 if clip % 3 == i else 2 for clip in range(batch.clips)]
            record.add(batch.name("ddim"), {"right": right, "repeats": 2, "seconds": 1.0, "peak_bytes": None})
        records.append(record)
    assert table(*records)[-1].accuracy == 0
    lowest = table(*records, randomized=["ddim"])[-1]
    assert (lowest.threat, lowest.n) == ("lowest of bpda, exact, gray-box", 6)
    assert lowest.accuracy == lowest.worst == pytest.approx(2 / 3)


def test_records_of_several_plans_share_a_minimum(tmp_path):
    records = [
        Record(tmp_path / f"{i}.json", plan(threat, names=("videopure",))) for i, threat in enumerate((BPDA, EXACT))
    ]
    for record, right in zip(records, ([1, 0, 1], [0, 1, 1]), strict=True):
        for batch in record.plan.batches():
            given = {"right": right[: batch.clips], "repeats": 1, "seconds": 1.0, "peak_bytes": None}
            record.add(batch.name("videopure"), given)
    *rows, worst = table(*records)
    assert [(row.threat_model, row.n, row.accuracy) for row in rows] == [("bpda", 10, 0.6), ("exact", 6, 2 / 3)]
    assert (worst.threat_model, worst.threat, worst.n, worst.accuracy) == (
        "adaptive",
        "minimum of bpda, exact",
        6,
        1 / 3,
    )


def test_clips_that_cannot_be_read_are_left_out(available, tmp_path):
    def some(seed: int, start: int, count: int) -> tuple[Tensor, Tensor]:
        """The first of each batch is missing, and of seed 1's second batch all."""
        drawn, labels = draw(seed, start, count)
        skipped = count if (seed, start) == (1, 3) else 1
        return drawn[skipped:], labels[skipped:]

    mine = plan(CLEAN, GRAY, BPDA, names=("none", "mean of 3 frames"))
    rows = table(evaluate(mine, EvalContext(CLASSIFIER, available, some), tmp_path / "record.json"))
    threat_models = ("none", "gray-box", "bpda", "adaptive")
    assert [(row.threat_model, row.n) for row in rows] == [(name, 5) for name in threat_models for _ in mine.defenses]
    assert rows[-1].threat == "minimum of clean, gray-box, bpda"


def test_examples_are_the_clips_that_the_defense_keeps_right(tmp_path, available):
    record = Record(tmp_path / "record.json", plan(GRAY, names=("none", "videopure")))
    for batch in record.plan.batches():
        for name, right in (("none", [0, 1, 0]), ("videopure", [0, 1, 1])):
            entry = {"right": right[: batch.clips], "repeats": 1, "seconds": 1.0, "peak_bytes": 5}
            record.add(batch.name(name), entry)
    assert rescued(record, GRAY, 8 / 255, "videopure")[:2] == [(0, 2), (1, 2)]
    assert len(rescued(record, GRAY, 8 / 255, "videopure")) == 10
    found = examples(record, GRAY, 8 / 255, "videopure", 2, EvalContext(CLASSIFIER, available, draw))
    assert torch.equal(found.clean, torch.cat([draw(seed, 2, 1)[0] for seed in (0, 1)]))


@pytest.mark.parametrize("threat", [CLEAN, GRAY, TRANSFER, BPDA, EXACT, QUERY], ids=lambda threat: threat.threat_model)
def test_examples_met_what_the_record_tells_of(threat, whole, available):
    eps = 0.0 if threat == CLEAN else 8 / 255
    for name in ("ddim", "videopure"):
        places = rescued(whole, threat, eps, name)
        found = examples(whole, threat, eps, name, len(places), EvalContext(CLASSIFIER, available, draw, SURROGATE))
        assert found.clean.shape == found.purified.shape == (len(places), 3, 4, 16, 16)
        assert (found.attacked - found.clean).abs().max() <= eps + 1e-7
        assert torch.equal(found.attacked_labels, CLASSIFIER(found.attacked).argmax(-1))
        kept = (found.purified_labels == found.labels).tolist()
        shares = outcome(whole, threat, eps, name).shares
        assert all(shares[place] in (right, 0.5) for place, right in zip(places, kept, strict=True))


def test_examples_of_nothing_are_refused(whole, available):
    with pytest.raises(ValueError, match="no clips of exact pgd, steps=2, step_size=2/255 at 4/255 against videopure"):
        examples(whole, EXACT, 4 / 255, "videopure", 1, EvalContext(CLASSIFIER, available, draw))


def test_a_cell_that_is_not_done_has_no_row(whole, tmp_path):
    record = Record(tmp_path / "record.json", whole.plan)
    for name, batch in list(whole.entries.items())[:-1]:
        record.entries[name] = batch
    assert len(table(record)) == len(table(whole)) - 1


def test_codecs_have_no_exact_gradient(available, tmp_path):
    small = replace(EXACT, clips=1)
    names = ("JPEG 75", "none")
    record = evaluate(plan(small, names=names), EvalContext(CLASSIFIER, available, draw), tmp_path / "record.json")
    assert [row.defense for row in table(record)] == ["none"]
    assert inaccessible(record) == {"exact": ["JPEG 75"]}


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}", '{"hash": 3}', "\0", '{"hash": "x", "entries": 3}', "[" * 200_000, '{"entries": {}}'),
        *({"a": {"right": None}}, {NAME: 5}, {NAME: {}}, {NAME: {"right": [1]}}, {NAME: ENTRY | {"right": ["x"]}}),
        *({NAME: ENTRY | {"right": [3]}}, {NAME: ENTRY | {"right": [1] * 4}}, {NAME: ENTRY | {"right": ""}}),
        *({NAME: ENTRY | {"right": {}}}, {NAME: ENTRY | {"right": [True]}}, {NAME: ENTRY | {"repeats": True}}),
        *({NAME: ENTRY | {"seconds": -1}}, {NAME: ENTRY | {"peak_bytes": "x"}}, {NAME: ENTRY | {"right": None}}),
        *({NAME: ENTRY | {"other": 1}}, {NAME: ENTRY | {"seconds": "1"}}, {NAME: ENTRY | {"seconds": 10**400}}),
        {NAME: ENTRY | {"peak_bytes": -1}},
    ],
    ids=lambda content: str(content)[:80],
)
def test_what_is_no_record_is_refused_and_kept(content, available, tmp_path):
    path = tmp_path / "record.json"
    if isinstance(content, dict):
        content = json.dumps({"hash": plan(CLEAN).hash, "entries": content})
    path.write_text(content)
    with pytest.raises(ValueError, match="is no record of an evaluation"):
        evaluate(plan(CLEAN), EvalContext(CLASSIFIER, available, draw), path)
    assert path.read_text() == content


def test_the_record_of_another_plan_is_refused(available, tmp_path):
    path, mine = tmp_path / "record.json", plan(CLEAN, names=("none",))
    evaluate(mine, EvalContext(CLASSIFIER, available, draw), path)
    with pytest.raises(ValueError, match="another plan, which differs in seeds, batch: name another file or folder"):
        Record(path, replace(mine, seeds=(0, 2), batch=2))
    assert json.loads(path.read_text())["plan"]["source"] == "test"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Threat("white-box"), "unknown threat_model 'white-box'; accepted: none, transfer, gray-box"),
        (lambda: Threat("exact", "pdg"), "unknown attack 'pdg'; accepted: fgsm, pgd"),
        (
            lambda: Threat("exact", "pgd", {"stepsize": 1}),
            "pgd has no stepsize; accepted: eot, loss, norm, random_start",
        ),
        (lambda: Threat("query", "square", {"eps": 1, "queries": 2}), "square has no eps; accepted: eot, loss, p_init"),
        (
            lambda: Threat("query", "pgd", {"steps": 1, "step_size": 0.1}),
            "'query' gives no gradients, which pgd needs; accepted: square",
        ),
        (lambda: Threat("exact", "pgd", {1: 2}), "pgd has no 1; accepted: eot"),
        (lambda: Threat("exact", ["pgd"]), r"unknown attack \['pgd'\]; accepted: fgsm, pgd"),
        (lambda: Threat("exact", clips=0), "clips must be 1 or more, got 0"),
        (lambda: Threat("gray-box"), "pgd needs step_size, steps among its settings"),
        (lambda: replace(plan(GRAY), eps=(4 / 255, 4.0000001 / 255)), "eps must not be empty or repeat a value"),
        (lambda: wilson_interval(0.5, 0), "has an interval, got 0.5 on 0"),
        (lambda: plan(), "threats must not be empty or repeat a value"),
        (lambda: plan(GRAY, GRAY), "threats must not be empty or repeat a value"),
        (lambda: replace(plan(GRAY), eps=(4.0,)), "every eps must be more than 0 and at most 1"),
        (lambda: replace(plan(GRAY), repeats=0), "repeats must be 1 or more, got 0"),
        (
            lambda: evaluate(plan(GRAY, names=("nothing",)), EvalContext(CLASSIFIER, {}, draw), "x"),
            "unknown defenses nothing",
        ),
        (
            lambda: evaluate(plan(TRANSFER, names=()), EvalContext(CLASSIFIER, {}, draw), "x"),
            "defenses must not be empty",
        ),
    ],
)
def test_bad_plans_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(plan(GRAY), batch=2.5), "batch must be an int, got 2.5"),
        (lambda: replace(plan(GRAY), eps=8 / 255), r"eps must be tuple\[float, ...\], got 0.03"),
        (lambda: replace(plan(GRAY), eps=("4",)), "eps must be"),
        (lambda: replace(plan(GRAY), seeds=("a",)), r"seeds must be tuple\[int, ...\], got \('a',\)"),
        (lambda: replace(plan(GRAY), threats=("none",)), "threats must be"),
        (lambda: Threat("exact", "pgd", ["steps"]), "settings must be a mapping of names to values, got list"),
        (lambda: evaluate(None, EvalContext(CLASSIFIER, {}, draw), "x"), "plan must be of type Plan, got NoneType"),
        (lambda: evaluate(plan(GRAY), None, "x"), "context must be of type EvalContext, got NoneType"),
        (
            lambda: Threat("exact", "fgsm", {"loss": len}),
            "loss must be a number, a string, a bool or None, got builtin",
        ),
    ],
)
def test_plans_of_other_types_are_refused(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_an_l2_threat_may_be_larger_than_a_pixel(available, tmp_path):
    threat = Threat("gray-box", "pgd", STEPS | {"norm": "l2"}, 2)
    mine = replace(plan(threat, names=("none",)), eps=(3.0,))
    assert table(evaluate(mine, EvalContext(CLASSIFIER, available, draw), tmp_path / "record.json"))[0].n == 4


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda x, y: (x * float("nan"), y), ValueError, "values from nan"),
        (lambda x, y: (x * 255, y), ValueError, r"values from .* in \[0, 1\]"),
        (lambda x, y: ((x * 255).byte(), y), TypeError, "of float32 or float64"),
        (lambda x, y: (x[0], y), ValueError, r"shape \(3, 4, 16, 16\)"),
        (lambda x, y: (x, y[:1]), ValueError, "labels must be"),
        (lambda x, y: (x, y.float()), TypeError, "labels must be dense int64"),
        (lambda x, y: (x, y + 99), ValueError, "but the classifier returns 3 classes"),
        (lambda x, y: (torch.cat([x, x]), torch.cat([y, y])), ValueError, "6 clips were drawn where 3 were asked for"),
    ],
)
def test_what_is_drawn_must_be_clips_and_labels(spoil, error, message, available, tmp_path):
    with pytest.raises(error, match=message):
        evaluate(plan(CLEAN), EvalContext(CLASSIFIER, available, lambda *a: spoil(*draw(*a))), tmp_path / "record.json")
    assert not (tmp_path / "record.json").exists()


def test_answers_that_are_not_finite_are_refused(available, tmp_path):
    class Broken(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * float("nan")

    with pytest.raises(ValueError, match="logits are not finite"):
        evaluate(plan(CLEAN), EvalContext(Broken().eval(), available, draw), tmp_path / "record.json")


def test_transfer_needs_a_surrogate(available, tmp_path):
    with pytest.raises(ValueError, match="'transfer' needs a surrogate, another classifier"):
        evaluate(plan(TRANSFER), EvalContext(CLASSIFIER, available, draw), tmp_path / "record.json")


@pytest.mark.parametrize("role", ["classifier", "surrogate"])
def test_classifiers_in_training_mode_are_refused(role, available, tmp_path):
    part = nn.Sequential(Classifier(), nn.Dropout()).eval()
    part[1].train()
    for module in (Classifier(), part):
        context = EvalContext(CLASSIFIER, available, draw, SURROGATE)._replace(**{role: module})
        with pytest.raises(ValueError, match=f"the {role}, or a part of it, is in training mode"):
            evaluate(plan(TRANSFER), context, tmp_path / "record.json")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 2, "step_size": -1.0}, "step_size must be more than 0"),
        ({"steps": "2", "step_size": 0.1}, "steps must be an int, got '2'"),
        (STEPS | {"loss": "cw"}, "loss must be callable or one of"),
    ],
)
def test_bad_settings_are_refused_before_any_attack(settings, message, available, tmp_path):
    with pytest.raises((ValueError, TypeError), match=message):
        evaluate(
            plan(CLEAN, BPDA, Threat("exact", "pgd", settings)),
            EvalContext(CLASSIFIER, available, draw),
            tmp_path / "r",
        )
    assert not list(tmp_path.iterdir())


def test_a_size_for_l2_alone_is_refused():
    with pytest.raises(ValueError, match="every eps must be more than 0 and at most 1"):
        replace(plan(GRAY, Threat("bpda", "pgd", STEPS | {"norm": "l2"})), eps=(3.0,))


def test_a_record_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    for path, message in ((tmp_path / "file" / "r.json", "cannot make the folder"), (tmp_path, "it is a folder")):
        with pytest.raises(ValueError, match=message):
            evaluate(plan(CLEAN, names=("none",)), EvalContext(CLASSIFIER, {"none": None}, None), path)


def test_a_record_says_where_it_was_made(available, tmp_path):
    mine, path = plan(CLEAN, names=("none",)), tmp_path / "record.json"
    evaluate(mine, EvalContext(CLASSIFIER, available, draw), path)
    (machine,) = Record(path, mine).machines
    assert machine["threads"] == torch.get_num_threads() and machine["device"].startswith("cpu")
    saved = json.loads(path.read_text())
    del saved["entries"][next(iter(saved["entries"]))]
    path.write_text(json.dumps(saved | {"machines": [{"device": "another"}]}))
    assert evaluate(mine, EvalContext(CLASSIFIER, available, draw), path).machines == [{"device": "another"}, machine]


def test_clips_that_come_back_between_threats_are_refused(available, tmp_path):
    """Else the clips that two attacks had in common would not be the same."""
    calls = []

    def once(seed: int, start: int, count: int) -> tuple[Tensor, Tensor]:
        calls.append(start)
        drawn, labels = draw(seed, start, count)
        return (drawn[1:], labels[1:]) if len(calls) == 1 else (drawn, labels)

    mine = replace(plan(CLEAN, BPDA, names=("none",)), seeds=(0,))
    for _ in range(2):  # what is in the record counts as what was drawn a moment ago
        with pytest.raises(ValueError, match="of seed 0's clips from 0 on 3 could be read, and 2 before"):
            evaluate(mine, EvalContext(CLASSIFIER, available, once), tmp_path / "record.json")


def test_settings_in_another_order_are_told_of(available, tmp_path):
    mine, path = plan(GRAY, names=("none",)), tmp_path / "record.json"
    evaluate(mine, EvalContext(CLASSIFIER, available, draw), path)
    turned = replace(GRAY, settings=dict(reversed(STEPS.items())))
    with pytest.raises(ValueError, match="the plan has no batch 'gray-box pgd.*are settings in another order"):
        Record(path, replace(mine, threats=(turned,)))


def test_seconds_are_the_median_over_batches(tmp_path):
    record = Record(tmp_path / "record.json", replace(plan(CLEAN, names=("none",)), seeds=(0, 1, 2), batch=5))
    for batch, seconds in zip(record.plan.batches(), (50.0, 5.0, 10.0), strict=True):
        record.add(batch.name("none"), {"right": [1] * 5, "repeats": 1, "seconds": seconds, "peak_bytes": None})
    assert table(record)[0].seconds_per_clip == 2.0


def test_two_processes_do_not_share_a_record(available, tmp_path):
    def draw_meanwhile(*arguments: int) -> tuple[Tensor, Tensor]:
        with pytest.raises(ValueError, match="another process works on"):
            evaluate(plan(CLEAN, names=("none",)), EvalContext(CLASSIFIER, available, draw), tmp_path / "record.json")
        return draw(*arguments)

    evaluate(plan(CLEAN, names=("none",)), EvalContext(CLASSIFIER, available, draw_meanwhile), tmp_path / "record.json")


def test_what_could_not_be_read_stays_in_the_record(available, tmp_path):
    given = (plan(CLEAN, names=("none",)), EvalContext(CLASSIFIER, available, draw), tmp_path / "record.json")
    evaluate(*given, skipped={tmp_path / "a.avi": "no video"})
    assert evaluate(*given, skipped={}).skipped == {str(tmp_path / "a.avi"): "no video"}


def test_logits_of_another_shape_are_refused(available, tmp_path):
    flat = nn.Sequential(CLASSIFIER, nn.Flatten(0)).eval()
    with pytest.raises(ValueError, match=r"must return logits \(3, K\), got \(9,\)"):
        evaluate(plan(CLEAN, names=("none",)), EvalContext(flat, available, draw), tmp_path / "record.json")
