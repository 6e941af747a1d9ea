"""The pauses between attempts to take a turn, and the text of the log."""

from __future__ import annotations

import pytest

from aibind_postgres._housekeeping import describe, seconds_until_next_turn


@pytest.mark.parametrize(
    ("taken", "remaining", "seconds"),
    [
        (True, None, 60),  # the first turn ever
        (True, -5, 60),
        (True, 10**15, 60),  # of a clock that was set back
        (False, 30_000, 30.001),
        (False, 1, 0.002),
        # Another process is taking the turn that is due.
        (False, 0, 60),
        (False, -5, 60),
        (False, None, 60),
        (False, 60_000, 60),
        (False, 10**15, 60),
    ],
)
def test_pause(taken: bool, remaining: int | None, seconds: float) -> None:
    assert seconds_until_next_turn(taken, remaining, 60_000) == seconds


def test_text_of_the_log() -> None:
    assert describe({}) == describe({"streams deleted": 0}) == ""
    assert describe({"streams deleted": 2, "chunks deleted": 0, "b": 1}) == "streams deleted: 2, b: 1"
