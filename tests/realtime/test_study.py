import json
import threading

import pytest
import torch
from stub_servers import CLIP, CLIPS, SleepingServer, service

from videopure_fast.realtime import figures, study
from videopure_fast.realtime.arrivals import Arrival, poisson
from videopure_fast.realtime.load import Record, offer
from videopure_fast.realtime.serving import Times
from videopure_fast.realtime.study import Setting, fewest, highest_load, measure_service, run, summarize
from videopure_fast.realtime.tables import sentences

# A batch of 4 is taken to cost as much as 2 single clips: no machine was measured.
ASSUMED_CURVE = {1: 1.0, 2: 4 / 3, 4: 2.0}


def record(due, *points, outcome="answered", deadline=None):
    return Record(0, due, due, deadline, outcome, Times(*points) if points else None)


def test_figures_of_a_run():
    records = [
        record(0.0, 0.0, 1.0, 1.1, 1.5, 1.8, 2.0, deadline=1.9),
        record(1.0, 1.0, 1.5, 2.0, 2.5, 3.0, 3.0, deadline=4.0),
        record(2.0, 2.0, 5.0, 5.5, 6.0, 7.0, 8.0, deadline=9.0),
        record(3.0, outcome="dropped", deadline=9.0),
        record(4.0, outcome="missed", deadline=9.0),
    ]
    found = summarize(records)
    assert (found["offered"], found["answered"], found["dropped"], found["missed"], found["refused"]) == (5, 3, 1, 1, 0)
    assert (found["late"], found["in_time"]) == (1, 0.4)
    assert found["latency"]["p50"] == 2.0 and found["latency"]["max"] == 6.0
    assert found["queue_age"]["p50"] == 1.0 and found["queue_age"]["max"] == 3.0
    assert found["offered_per_second"] == 1.0 and found["answered_per_second"] == 3 / 8
    assert found["utilization"] == pytest.approx((2 + 3) / 8)  # busy from 1 to 3, and from 5 to 8
    assert found["stages"] == pytest.approx(
        {"wait": 4.5 / 3, "encode": 1.1 / 3, "sample": 1.4 / 3, "decode": 1.8 / 3, "label": 1.2 / 3}
    )
    assert sum(found["stages"].values()) == pytest.approx(found["latency"]["mean"])


def test_figures_of_a_run_without_answers():
    found = summarize([record(0.0, outcome="failed")._replace(error="ValueError: no")])
    assert found["failed"] == 1 and found["error"] == "ValueError: no"
    assert found["latency"] is found["queue_age"] is found["stages"] is None
    assert found["answered_per_second"] == found["utilization"] == found["in_time"] == 0


def test_words_are_about_every_setting():
    records = [record(i, i, i + 0.1, i + 0.2, i + 0.5, i + 0.8, i + 1.0) for i in range(3)]
    rows = [study.row(Setting(batch), records, load=load) for load in (0.5, 0.8) for batch in (1, 4)]
    _, *said = sentences(service(0.5), rows)
    assert len(said) == 4 and all(str(Setting(batch)) in one for one, batch in zip(said, (1, 4, 1, 4), strict=True))
    _, *said = sentences(service(0.5), rows[::2])
    assert len(said) == 2 and all(str(Setting()) not in one for one in said)


def test_a_time_alone_that_was_disturbed_is_said():
    records = [record(i, i, i + 0.1, i + 0.2, i + 0.5, i + 0.8, i + 1.0) for i in range(3)]  # one a second
    _, second, *_ = sentences(service(8.6), [study.row(Setting(), records, load=0.5)])
    assert second.startswith("But 1 clips a second were answered") and "measure again" in second


@pytest.mark.parametrize("policies, batches", [(["block"], [1, 2]), (["reject", "drop-oldest"], [1])])
def test_settings_have_panels_of_their_own(tmp_path, monkeypatch, policies, batches):
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.append(figure))
    records = [record(i, i, i + 0.1, i + 0.2, i + 0.5, i + 0.8, i + 1.0) for i in range(3)]
    settings = [Setting(batch, policy=policy) for batch in batches for policy in policies]
    rows = [study.row(setting, records, load=load) for load in (0.5, 0.8) for setting in settings]
    figures.draw_load(rows, tmp_path / "load.png")
    *panels, last = drawn[0].axes
    assert len(panels) == 2 and len({ax.get_title() for ax in panels}) == 2
    for ax in panels:
        assert all(len(line.get_xdata()) == 2 for line in ax.get_lines())
    assert [tick.get_text() for tick in last.get_xticklabels()] == ["50", "80"]


@pytest.mark.parametrize("clips", [1, 3])
def test_a_timeline_of_few_clips_is_readable(tmp_path, monkeypatch, clips):
    """Its texts are within the picture."""
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.append(figure))
    records = [record(i, i, i + 0.1, i + 0.2, i + 0.5, i + 0.8, i + 1.0) for i in range(clips)]
    figures.draw_timeline(study.row(Setting(), records), tmp_path / "clips.png")
    (figure,) = drawn
    figure.draw_without_rendering()
    (ax,) = figure.axes
    for text in (ax.xaxis.label, ax.yaxis.label, ax._left_title, *figure.legends[0].get_texts()):
        box = text.get_window_extent()
        assert box.y0 >= 0 and box.y1 <= figure.bbox.y1 and box.x0 >= 0 and box.x1 <= figure.bbox.x1, text


def test_service_times_are_those_of_the_server():
    expected = service(0.02, curve=ASSUMED_CURVE)
    with SleepingServer(expected, Setting(max_batch=4)) as server:
        found = measure_service(server, CLIP, depth=expected.depth, batches=(1, 2, 4), repeats=2)
    for stage in ("encode", "evaluation", "decode", "label"):
        for size in (1, 2, 4):
            assert found.seconds(stage, size) == pytest.approx(expected.seconds(stage, size))
    assert found.clip_seconds() == pytest.approx(0.02) and found.clip_seconds(4) == pytest.approx(0.04)


def test_a_batch_that_the_server_does_not_take_is_refused():
    with (
        SleepingServer(service(0.005), Setting(max_batch=2)) as server,
        pytest.raises(ValueError, match="did not take 4 clips together"),
    ):
        measure_service(server, CLIP, depth=2, batches=(4,))


def test_service_times_between_and_beyond_what_was_measured():
    times = service(1.0, depth=4, curve=ASSUMED_CURVE)
    assert times.seconds("encode", 3) == pytest.approx((0.1 * 4 / 3 + 0.2) / 2)
    assert times.seconds("encode", 8) == pytest.approx(0.4)
    assert times.clip_seconds(steps=0) == pytest.approx(0.2 + 0.8 / 5)
    assert times.scaled("decode", 0.1).clip_seconds() == pytest.approx(0.91)
    spread = times._replace(decode={1: [3.0, 1.0, 2.0]})
    assert [spread.seconds("decode", 1, quantile) for quantile in (0.0, 0.5, 0.99)] == [1.0, 2.0, 3.0]
    assert spread.seconds("decode", 1) == 2.0


def test_settings_are_compared_on_the_same_arrivals():
    arrivals = [Arrival(0.0, number) for number in range(12)]
    settings = [Setting(), Setting(queue_size=3, policy="reject"), Setting(queue_size=3, policy="drop-oldest")]
    rows = [
        run(lambda setting: SleepingServer(service(0.01), setting), setting, CLIPS, arrivals, load=9)
        for setting in settings
    ]
    assert [row["load"] for row in rows] == [9, 9, 9]
    dues = [[record.due for record in study.read_records(row)] for row in rows]
    assert dues[0] == dues[1] == dues[2]
    block, reject, drop = (row["summary"] for row in rows)
    assert (block["answered"], block["refused"], block["dropped"]) == (12, 0, 0)
    assert reject["refused"] >= 8 and drop["dropped"] >= 8
    assert reject["answered"] + reject["refused"] == drop["answered"] + drop["dropped"] == 12


@pytest.mark.realtime
def test_where_a_batch_pays_it_carries_more_load_at_the_same_p95():
    """The highest load at which p95 is within three clips' time, one by one and in batches of up to four."""
    seconds = 0.01
    times = service(seconds, curve=ASSUMED_CURVE)

    def carried(max_batch):
        def meets(load):
            arrivals = poisson(load / seconds, seconds=5, seed=11)
            with SleepingServer(times, Setting(max_batch, queue_size=10_000)) as server:
                return summarize(offer(server, CLIPS, arrivals))["latency"]["p95"] <= 3 * seconds

        return highest_load(meets, 0.4, 1.6, within=0.05)

    assert carried(4) >= 1.3 * carried(1)


def test_the_highest_load_is_found():
    tried = []

    def meets(load):
        tried.append(load)
        return load <= 0.73

    assert highest_load(meets, 0.1, 2, within=0.01) == pytest.approx(0.73, rel=0.011)
    assert len(tried) < 15
    assert highest_load(lambda load: True, 0.1, 2) == 2
    assert highest_load(lambda load: False, 0.1, 2) is None
    for bad in ((0, 1, 0.1), (1, 1, 0.1), (0.1, 1, 0)):
        with pytest.raises(ValueError, match="accepted"):
            highest_load(meets, *bad[:2], within=bad[2])


@pytest.mark.parametrize("least", [1, 2, 7, 530, 999, 1000])
def test_the_fewest_are_found(least):
    assert fewest(lambda number: number >= least, most=1000) == least
    assert fewest(lambda number: number >= least, least=3, most=1000) == max(3, least)


def test_none_where_even_the_most_do_not_suffice():
    assert fewest(lambda number: False, most=1000) is None


def test_a_saved_study_is_read_again(tmp_path):
    row = run(lambda _: SleepingServer(service(0.002)), Setting(), CLIPS, [Arrival(0.0, deadline=9.0), Arrival(0.01)])
    made = study.new_study(torch.device("cpu"), model="tiny")
    made["rows"].append(row)
    file = tmp_path / "study.json"
    study.save(made, file)
    found = study.load(file)
    assert found == json.loads(json.dumps(made))
    assert found["kind"] == "videopure-fast latency" and "cpu" in found["machine"]["device"]
    records = study.read_records(found["rows"][0])
    assert [record.due for record in records] == [0.0, 0.01] and records[0].deadline == 9.0
    assert summarize(records)["latency"]["mean"] == pytest.approx(row["summary"]["latency"]["mean"], abs=1e-5)
    assert not row["simulated"]


@pytest.mark.parametrize("text", ["{", "[]", '{"kind": "videopure-fast bench"}'])
def test_other_files_are_no_study(tmp_path, text):
    file = tmp_path / "study.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="study"):
        study.load(file)
    with pytest.raises(ValueError, match="cannot read a study"):
        study.load(tmp_path / "none.json")


def test_a_run_ends_its_server():
    before = threading.active_count()
    with pytest.raises(ValueError, match="accepted: one of each or more"):
        run(lambda _: SleepingServer(service(0.001)), Setting(), CLIPS, [])
    assert threading.active_count() == before
