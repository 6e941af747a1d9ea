"""How long to rest after a notification. Pure."""

from __future__ import annotations

import math
from collections import deque

# Seconds, times the square of the number of changes. A fast writer needs few notifications, since each covers many
# changes. With the square, a writer is either notified of each change or soon rests for the whole maximum.
REST_PER_CHANGE = 0.0003
REST_PER_DELAY = 60  # times the delay of a send, since a server or process that is busy delays the writers as well
MAX_REST = 0.1  # seconds
MAX_REST_UNDELAYED = 0.01  # seconds
SENDS = 3  # with two, one rest in some hundred chunks was long although no writer was delayed
VARIATION = 0.001  # seconds by which sends differ although no writer is delayed
WINDOW = 200  # sends after which the fastest one is forgotten

# Of all stores together, in one second. Each of them reaches the listening session and the process of every store, so
# the cost of a notification grows with the number of processes. Above this rate, stores combine more changes in each.
MAX_TRAFFIC = 1_000
TRAFFIC_PERIOD = 1.0  # seconds in which received notifications are counted


class NotifyPace:
    """The rests of one notifier.

    The delay of a send is its duration beyond twice that of the fastest recent send. It counts if the send took over
    `VARIATION` longer than the fastest one. Of `SENDS` successive sends the shortest one counts, so that the pauses of
    a busy machine have no effect.
    """

    def __init__(self) -> None:
        self._fastest = self._fastest_before = math.inf  # in the current window, and in the one before
        self._sends = 0
        self._durations = deque[float](maxlen=SENDS)

    def rest(self, duration: float, changes: int) -> float:
        """Return the seconds to rest after a send.

        Args:
            duration: The seconds that the send took.
            changes: The number of changes that it has notified of.
        """
        if self._sends % WINDOW == 0:
            self._fastest_before, self._fastest = self._fastest, math.inf
        self._sends += 1
        self._fastest = min(self._fastest, duration)
        self._durations.append(duration)
        delay = 0.0
        if len(self._durations) == SENDS:
            fastest, shortest = min(self._fastest, self._fastest_before), min(self._durations)
            if shortest > fastest + VARIATION:
                delay = shortest - 2 * fastest
        undelayed = min(REST_PER_CHANGE * changes**2, MAX_REST_UNDELAYED)
        return min(max(undelayed, REST_PER_DELAY * delay), MAX_REST)


class NotifyTraffic:
    """The notifications that a store receives from others, and the rest that they require.

    With n senders, a rest of n / `MAX_TRAFFIC` keeps them at that rate together. It is shorter in proportion if the
    rate is lower. The rate is the mean of the last period and of the mean before it: without the earlier periods,
    stores that react to each other would send fast and slowly by turns.

    `received` is called by one worker, `rest` by another.
    """

    def __init__(self) -> None:
        self._since = 0.0  # begin of the current period
        self._count = 0
        self._senders: set[str] = set()
        self._rate = 0.0
        self._rest = (0.0, 0.0)  # and the time until which it applies

    def received(self, sender: str, now: float) -> None:
        """Count a notification of another store."""
        elapsed = now - self._since
        if elapsed >= TRAFFIC_PERIOD:
            rate = self._count / elapsed
            self._rate = (self._rate + rate) / 2 if elapsed < 2 * TRAFFIC_PERIOD else rate  # else it is out of date
            # A higher rate is that of other software, which does not rest.
            rest = (1 + len(self._senders)) * min(self._rate, MAX_TRAFFIC) / MAX_TRAFFIC**2
            self._rest = (min(rest, MAX_REST), now + 2 * TRAFFIC_PERIOD)
            self._since, self._count, self._senders = now, 0, set()
        self._count += 1
        self._senders.add(sender)

    def rest(self, now: float) -> float:
        """Return the seconds to rest after a send."""
        rest, until = self._rest
        return rest if now < until else 0.0
