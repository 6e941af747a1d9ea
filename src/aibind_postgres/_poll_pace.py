"""When to poll, and which streams: quick polls for streams that may change without a notification. Pure."""

from __future__ import annotations

QUICK_POLLS = 50  # of a stream, after a change without a notification and after a reader has joined
QUIET_FACTOR = 10  # one poll of this many includes the quiet streams
MAX_HURRIED = 1.0  # seconds between two polls of all streams while a lease has expired
MAX_POLL_RETRY = 5.0  # the longest pause in seconds after a poll that failed


class PollPace:
    """The pauses between the polls of one store.

    All polls but one of `QUIET_FACTOR` are quick: they leave out the streams that have been quiet for `QUICK_POLLS`
    polls. A quick poll without streams needs no statement.
    """

    def __init__(self, interval: float) -> None:
        self.pause = interval  # seconds between the last poll and the next one
        self._interval = interval
        self._polls = 0

    @property
    def is_quick(self) -> bool:
        """Whether the next poll leaves out quiet streams."""
        return self._polls % QUIET_FACTOR != 0

    def polled(self) -> None:
        self._polls += 1
        self.pause = self._interval

    def hurry(self) -> None:
        """Let the next poll include the quiet streams, and come within a second."""
        if QUIET_FACTOR * self._interval > MAX_HURRIED:
            self._polls = 0
            self.pause = min(self.pause, MAX_HURRIED)

    def failed(self) -> None:
        self.pause = min(self.pause * 2, max(MAX_POLL_RETRY, self._interval))
