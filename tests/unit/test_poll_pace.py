"""The pauses between polls."""

from __future__ import annotations

from aibind_postgres._poll_pace import MAX_POLL_RETRY, QUIET_FACTOR, PollPace


def test_one_poll_of_ten_includes_quiet_streams():
    pace = PollPace(0.1)
    quick = []
    for _ in range(2 * QUIET_FACTOR):
        assert pace.pause == 0.1
        quick.append(pace.is_quick)
        pace.polled()
    assert quick == [False, *[True] * (QUIET_FACTOR - 1)] * 2


def test_failed_polls_are_repeated_with_growing_pauses():
    pace = PollPace(0.1)
    pauses = []
    for _ in range(8):
        pace.failed()
        pauses.append(pace.pause)
        assert not pace.is_quick
    assert pauses[:3] == [0.2, 0.4, 0.8]
    assert pauses[-1] == MAX_POLL_RETRY
    pace.polled()
    assert pace.pause == 0.1


def test_pause_after_a_failure_is_at_least_the_interval():
    pace = PollPace(60)
    pace.failed()
    assert pace.pause == 60
