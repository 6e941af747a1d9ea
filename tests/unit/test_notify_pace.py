"""The rests of a notifier after its notifications."""

from __future__ import annotations

import heapq
from collections import Counter

import pytest

from aibind_postgres._notify_pace import (
    MAX_REST,
    MAX_REST_UNDELAYED,
    MAX_TRAFFIC,
    REST_PER_CHANGE,
    SENDS,
    TRAFFIC_PERIOD,
    VARIATION,
    WINDOW,
    NotifyPace,
    NotifyTraffic,
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


def fleet_rates(stores: int, seconds: int) -> list[float]:
    """Return the notifications that all stores together send in each second, if each of them always has changes."""
    fleet = [NotifyTraffic() for _ in range(stores)]
    due = [(number / stores / 100, number) for number in range(stores)]
    sent: Counter[int] = Counter()
    while due[0][0] < seconds:
        now, sender = heapq.heappop(due)
        sent[int(now)] += 1
        for number, traffic in enumerate(fleet):
            if number != sender:
                traffic.received(str(sender), now)
        rest = max(MAX_REST_UNDELAYED, fleet[sender].rest(now))
        heapq.heappush(due, (now + FAST + rest, sender))
    return [sent[second] for second in range(seconds)]


@pytest.mark.parametrize("stores", [20, 64])
def test_busy_stores_share_the_traffic(stores: int) -> None:
    rates = fleet_rates(stores, 10)
    assert rates[0] > 1.5 * MAX_TRAFFIC
    assert all(0.8 * MAX_TRAFFIC < rate < 1.2 * MAX_TRAFFIC for rate in rates[5:])


def test_few_stores_do_not_rest_for_the_traffic() -> None:
    rates = fleet_rates(5, 5)
    assert min(rates) > 0.99 * 5 / (FAST + MAX_REST_UNDELAYED)


def test_traffic_that_has_ended() -> None:
    traffic = NotifyTraffic()
    for number in range(20_000):
        traffic.received(str(number % 200), number / 2_000)
    assert traffic.rest(10.0) == MAX_REST
    assert traffic.rest(10.0 + 3 * TRAFFIC_PERIOD) == 0


def test_traffic_before_an_idle_time_does_not_count():
    traffic = NotifyTraffic()
    for number in range(20_000):
        traffic.received(str(number % 64), number / 2_000)
    assert traffic.rest(10.0) > 0.05
    traffic.received("1", 3_600.0)
    assert traffic.rest(3_600.0) < 0.001


def test_one_sender_that_does_not_rest_hardly_delays_others():
    traffic = NotifyTraffic()
    for number in range(60_000):
        traffic.received("trigger", number / 20_000)
    assert 0 < traffic.rest(3.0) <= 0.002
