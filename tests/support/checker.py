"""What many callers did to a few streams at the same time, and whether that can have happened as promised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from aibind_postgres import SequenceConflictError, StreamNotActiveError, StreamStatus

KNOWN_ERRORS = (SequenceConflictError, StreamNotActiveError)


@dataclass
class Step:
    """One call: when it began and ended, by a clock that all share, and what came of it."""

    stream: str
    kind: str  # append, end or read
    began: int
    texts: Sequence[str] = ()
    expected: int | None = None
    after: int = 0
    follows: bool = False
    state: str = ""
    result: Any = None
    ended: int = 0


@dataclass
class Record:
    """All steps of a run."""

    clock: count = field(default_factory=count)
    steps: list[Step] = field(default_factory=list)

    def begin(self, stream: str, kind: str, **details: Any) -> Step:
        step = Step(stream, kind, next(self.clock), **details)
        self.steps.append(step)
        return step

    def end(self, step: Step, result: Any) -> None:
        """Note what came of a step: what the call returned, or an error that says that nothing was done."""
        step.result, step.ended = result, next(self.clock)

    def of(self, stream: str, kind: str) -> list[Step]:
        return [step for step in self.steps if (step.stream, step.kind) == (stream, kind)]


def check(record: Record, stream: str, stored: Sequence[tuple[int, str]], status: StreamStatus) -> int:
    """Assert that a stream which has ended is what its callers were told, and return how many chunks it has."""
    texts = [text for _, text in stored]
    assert [seq for seq, _ in stored] == list(range(1, len(stored) + 1)), "a number is missing, or there twice"
    assert status.total_chunks == len(stored)
    _check_appends(record.of(stream, "append"), texts)
    _check_ends(record, stream, texts, status)
    _check_reads(record, stream, texts)
    return len(stored)


def _check_appends(appends: Sequence[Step], texts: Sequence[str]) -> None:
    assert max(Counter(texts).values(), default=1) == 1, "a chunk is there twice"
    acknowledged = [step for step in appends if isinstance(step.result, int)]
    claimed = set()
    for step in acknowledged:
        first = step.result - len(step.texts)
        assert list(texts[first : step.result]) == list(step.texts), f"acknowledged, and not there: {step}"
        assert step.expected in (None, first + 1), f"not at the expected number: {step}"
        claimed.update(step.texts)
    assert claimed == set(texts), "there is a chunk of which nobody was told"
    for step in appends:
        if not isinstance(step.result, int):
            assert isinstance(step.result, KNOWN_ERRORS), f"an error that was not to be: {step}"
            # Also if the same was sent twice: whoever comes second is to be told that it is there.
            assert claimed.isdisjoint(step.texts), f"refused, and there: {step}"
    # What began after another was acknowledged comes behind it. A repeated one tells of an earlier time.
    plain = [step for step in acknowledged if step.expected is None and step.texts]
    by_end = sorted(plain, key=lambda step: step.ended)
    highest, place = 0, 0
    for step in sorted(plain, key=lambda step: step.began):
        while place < len(by_end) and by_end[place].ended < step.began:
            highest = max(highest, by_end[place].result)
            place += 1
        assert step.result - len(step.texts) >= highest, f"before what was acknowledged when it began: {step}"


def _check_ends(record: Record, stream: str, texts: Sequence[str], status: StreamStatus) -> None:
    ends = record.of(stream, "end")
    winners = [step for step in ends if step.result is True]
    assert len(winners) == 1, f"of several ends {len(winners)} won"
    assert all(step.result in (True, False) for step in ends)
    assert status.state == winners[0].state
    over = min(step.ended for step in ends)
    for step in record.of(stream, "append"):
        if step.began > over and isinstance(step.result, int) and step.expected is None:
            raise AssertionError(f"written after the end: {step}")
        if isinstance(step.result, StreamNotActiveError):
            assert step.result.state == status.state
            assert step.ended > winners[0].began, f"refused before the end: {step}"
        if isinstance(step.result, SequenceConflictError):
            assert 1 <= step.result.actual <= len(texts) + 1


def _check_reads(record: Record, stream: str, texts: Sequence[str]) -> None:
    acknowledged = sorted(
        (step.ended, step.result) for step in record.of(stream, "append") if isinstance(step.result, int)
    )
    for step in record.of(stream, "read"):
        found = list(enumerate(texts, 1))[step.after : step.after + len(step.result)]
        assert step.result == found, f"not what is stored, or not in order: from {step.after}: {step.result[:5]}"
        least = max((last for ended, last in acknowledged if ended < step.began), default=0)
        if step.follows:
            least = len(texts)
        assert step.after + len(step.result) >= least, f"too short: {step}"
