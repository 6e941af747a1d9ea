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
