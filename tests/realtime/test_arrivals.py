import json
import math

import pytest

from videopure_fast.realtime.arrivals import Arrival, bursts, cameras, poisson, recorded, with_deadlines


def gaps(dues):
    return [later - earlier for earlier, later in zip(dues, dues[1:], strict=False)]


def test_a_camera_gives_a_clip_each_hop_after_its_first_window():
    found = cameras(3, seconds=20, rate=25, window=16, hop=8, seed=3)
    assert found == sorted(found)
    for camera in range(3):
        dues = [arrival.due for arrival in found if arrival.source == camera]
        assert 16 / 25 <= dues[0] < 24 / 25 and 20 - 8 / 25 <= dues[-1] < 20
        assert gaps(dues) == pytest.approx([8 / 25] * (len(dues) - 1))
    assert len({arrival.due for arrival in found}) == len(found)  # the cameras are not in step


def test_cameras_that_are_switched_off_before_their_first_window_give_nothing():
    assert cameras(2, seconds=0.5, rate=25, window=16, hop=16) == []


def test_poisson_has_the_rate_and_the_spread_of_an_exponential():
    dues = [arrival.due for arrival in poisson(50, seconds=400, seed=1)]
    between = gaps(dues)
    mean = sum(between) / len(between)
    assert len(dues) == pytest.approx(20_000, rel=0.03) and max(dues) < 400
    assert mean == pytest.approx(0.02, rel=0.03)
    assert sum(gap > mean for gap in between) / len(between) == pytest.approx(math.exp(-1), rel=0.03)


def test_a_burst_is_due_at_one_moment_and_mixes_depths():
    found = bursts(4, every=2, seconds=400, steps=[1, 5], seed=7)
    moments = sorted({arrival.due for arrival in found})
    assert len(moments) == pytest.approx(200, rel=0.25)
    orders = set()
    for moment in moments:
        depths = tuple(arrival.steps for arrival in found if arrival.due == moment)
        assert sorted(depths) == [1, 1, 5, 5]
        assert {arrival.source % 2 for arrival in found if arrival.steps == 5} == {1}
        orders.add(depths)
    assert len(orders) == 6  # every order occurs


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: cameras(5, seconds=9, seed=seed),
        lambda seed: poisson(20, seconds=9, seed=seed),
        lambda seed: bursts(3, every=1, seconds=9, seed=seed),
    ],
)
def test_a_seed_decides(make):
    assert make(1) == make(1) != make(2)


def test_deadlines_go_around_the_sources():
    found = with_deadlines([Arrival(0.0, 0), Arrival(0.1, 1), Arrival(0.2, 2)], [0.5, 2])
    assert [arrival.deadline for arrival in found] == [0.5, 2, 0.5]


def test_recorded_arrivals_are_read_again(tmp_path):
    file = tmp_path / "arrivals.json"
    written = with_deadlines(cameras(2, seconds=5, seed=1), [1.5])
    file.write_text(json.dumps(written))
    assert recorded(file) == written
    file.write_text("[2, [1.5, 3], [0, 1, null, 4]]")
    assert recorded(file) == [Arrival(0, 1, None, 4), Arrival(1.5, 3), Arrival(2)]


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("{", "is not JSON"),
        ("{}", "no list of arrivals"),
        ("[]", "no list of arrivals"),
        ("[1, -2]", "arrival 1"),
        ("[NaN]", "arrival 0"),
        ("[true]", "arrival 0"),
        ('["soon"]', "arrival 0"),
        ("[[]]", "arrival 0"),
        ("[[1, -1]]", "source"),
        ("[[1, 0, 0]]", "deadline"),
        ("[[1, 0, 1, 0.5]]", "steps"),
        ("[[1, 0, 1, 1, 1]]", "arrival 0"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_other_files_are_refused(tmp_path, text, seen):
    file = tmp_path / "arrivals.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=seen) as refused:
        recorded(file)
    assert "accepted: a JSON list of seconds" in str(refused.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda: cameras(0, seconds=1),
        lambda: cameras(1, seconds=0),
        lambda: cameras(1, seconds=1, window=1),
        lambda: cameras(1, seconds=1, hop=17),
        lambda: cameras(1, seconds=1, rate=math.nan),
        lambda: cameras(10**6, seconds=10**4),
        lambda: poisson(0, seconds=1),
        lambda: poisson(1, seconds=math.inf),
        lambda: poisson(1e9, seconds=1e9),
        lambda: bursts(0, every=1, seconds=1),
        lambda: bursts(1, every=0, seconds=1),
        lambda: bursts(1, every=1, seconds=1, steps=[]),
        lambda: with_deadlines([Arrival(0.0)], []),
        lambda: with_deadlines([Arrival(0.0)], [0.0]),
        lambda: recorded("/nowhere/arrivals.json"),
    ],
)
def test_bad_values_are_refused(call):
    with pytest.raises(ValueError, match="got|accepted|no file"):
        call()
