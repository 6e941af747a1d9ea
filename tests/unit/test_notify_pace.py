"""The rests of a notifier after its notifications."""

from __future__ import annotations

import pytest

from aibind_postgres._notify_pace import (
    MAX_REST,
    MAX_REST_UNDELAYED,
    REST_PER_CHANGE,
    SENDS,
    VARIATION,
    WINDOW,
    NotifyPace,
)

FAST = 0.0005  # seconds of a send by an idle server


@pytest.fixture
def pace() -> NotifyPace:
    """A pace after a few fast sends."""
    pace = NotifyPace()
    for _ in range(5):
        pace.rest(FAST, 1)
    return pace


def test_single_changes_of_an_idle_server(pace: NotifyPace) -> None:
    assert pace.rest(FAST, 1) == REST_PER_CHANGE
    for _ in range(2 * SENDS):
        assert pace.rest(0.99 * (FAST + VARIATION), 1) == REST_PER_CHANGE


def test_first_send() -> None:
    assert NotifyPace().rest(1, 1) == REST_PER_CHANGE  # nothing shows yet that it was delayed


def test_rest_grows_with_the_changes(pace: NotifyPace) -> None:
    rests = [pace.rest(FAST, changes) for changes in range(1, 100)]
    assert rests == sorted(rests)
    assert rests[2] > 3 * rests[0]
    assert rests[-1] == MAX_REST_UNDELAYED


def test_few_delayed_sends_have_no_effect(pace: NotifyPace) -> None:
    for _ in range(3):
        for _ in range(SENDS - 1):
            assert pace.rest(1, 1) == REST_PER_CHANGE
        assert pace.rest(FAST, 1) == REST_PER_CHANGE


def test_delayed_sends(pace: NotifyPace) -> None:
    for _ in range(SENDS - 1):
        pace.rest(6 * FAST, 1)
    assert MAX_REST / 10 < pace.rest(6 * FAST, 1) <= MAX_REST
    pace.rest(1, 1)
    assert pace.rest(1, 1) <= MAX_REST
    assert pace.rest(1, 1) == MAX_REST
    assert pace.rest(FAST, 1) == REST_PER_CHANGE


def test_slower_network_becomes_the_normal_case(pace: NotifyPace) -> None:
    slow = 20 * FAST
    rests = [pace.rest(slow, 1) for _ in range(3 * WINDOW)]
    assert rests[SENDS - 1] == MAX_REST
    assert rests[-1] == REST_PER_CHANGE
