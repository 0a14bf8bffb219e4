"""What clips are taken to need."""

from __future__ import annotations

import pytest

from videopure_fast.realtime.estimates import Estimates


def test_the_first_clip_of_a_kind_says_nothing():
    estimates = Estimates()
    estimates.took("clip", 100.0)  # everything was compiled for it
    assert estimates.least("clip") == 0
    estimates.took("clip", 2.0)
    assert estimates.least("clip") == 2
    estimates.takes_more("other", 100.0)  # the first one, too, and it was given up
    assert estimates.least("other") == 0
    estimates.takes_more("other", 3.0)
    assert estimates.least("other") == 3


def test_a_faster_clip_counts_at_once_and_a_slower_one_in_part():
    estimates = Estimates()
    estimates.restart("clip")
    for seconds, known in ((2.0, 2.0), (1.0, 1.0), (2.0, 1.2), (1.2, 1.2)):
        estimates.took("clip", seconds)
        assert estimates.least("clip") == pytest.approx(known)
    estimates.takes_more("clip", 1.0)
    assert estimates.least("clip") == pytest.approx(1.2)
    estimates.takes_more("clip", 5.0)
    estimates.doubt("clip")
    assert estimates.least("clip") == pytest.approx(4.75)
    estimates.doubt("unknown")
    assert estimates.least("unknown") == 0


def test_kinds_that_have_not_come_for_long_are_forgotten():
    estimates = Estimates()
    for kind in range(10_000):
        estimates.restart(kind)
        estimates.took(kind, 1.0)
    assert estimates.least(9_999) == 1 and estimates.least(0) == 0
    assert len(estimates._seconds) < 1000
