"""Records the calls of concurrent clients, and checks their results against the guarantees of streams."""

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
    """One call: its start and end, by a clock shared by all clients, and its result."""

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
    """The steps of a run."""

    clock: count = field(default_factory=count)
    steps: list[Step] = field(default_factory=list)

    def begin(self, stream: str, kind: str, **details: Any) -> Step:
        step = Step(stream, kind, next(self.clock), **details)
        self.steps.append(step)
        return step

    def end(self, step: Step, result: Any) -> None:
        """Record the result of a step: the return value, or an error after which nothing was written."""
        step.result, step.ended = result, next(self.clock)

    def of(self, stream: str, kind: str) -> list[Step]:
        return [step for step in self.steps if (step.stream, step.kind) == (stream, kind)]


def check(record: Record, stream: str, stored: Sequence[tuple[int, str]], status: StreamStatus) -> int:
    """Assert that an ended stream matches the results of its callers, and return its number of chunks."""
    texts = [text for _, text in stored]
    assert [seq for seq, _ in stored] == list(range(1, len(stored) + 1)), "a number is missing or duplicated"
    assert status.total_chunks == len(stored)
    _check_appends(record.of(stream, "append"), texts)
    _check_ends(record, stream, texts, status)
    _check_reads(record, stream, texts)
    return len(stored)


def _check_appends(appends: Sequence[Step], texts: Sequence[str]) -> None:
    assert max(Counter(texts).values(), default=1) == 1, "a chunk is duplicated"
    acknowledged = [step for step in appends if isinstance(step.result, int)]
    claimed = set()
    for step in acknowledged:
        first = step.result - len(step.texts)
        assert list(texts[first : step.result]) == list(step.texts), f"acknowledged, but not stored: {step}"
        assert step.expected in (None, first + 1), f"not at the expected number: {step}"
        claimed.update(step.texts)
    assert claimed == set(texts), "a chunk was not acknowledged"
    for step in appends:
        if not isinstance(step.result, int):
            assert isinstance(step.result, KNOWN_ERRORS), f"unexpected error: {step}"
            # A repeated append succeeds if its text is stored, so it must not be refused.
            assert claimed.isdisjoint(step.texts), f"refused, but stored: {step}"
    # An append that began after another was acknowledged follows it. Repeated appends return earlier numbers.
    plain = [step for step in acknowledged if step.expected is None and step.texts]
    by_end = sorted(plain, key=lambda step: step.ended)
    highest, index = 0, 0
    for step in sorted(plain, key=lambda step: step.began):
        while index < len(by_end) and by_end[index].ended < step.began:
            highest = max(highest, by_end[index].result)
            index += 1
        assert step.result - len(step.texts) >= highest, f"stored before a chunk that was acknowledged earlier: {step}"


def _check_ends(record: Record, stream: str, texts: Sequence[str], status: StreamStatus) -> None:
    ends = record.of(stream, "end")
    winners = [step for step in ends if step.result is True]
    assert len(winners) == 1, f"{len(winners)} ends succeeded instead of one"
    assert all(step.result in (True, False) for step in ends)
    assert status.state == winners[0].state
    first_end = min(step.ended for step in ends)
    for step in record.of(stream, "append"):
        if step.began > first_end and isinstance(step.result, int) and step.expected is None:
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
        assert step.result == found, f"differs from the stored chunks: from {step.after}: {step.result[:5]}"
        least = max((last for ended, last in acknowledged if ended < step.began), default=0)
        if step.follows:
            least = len(texts)
        assert step.after + len(step.result) >= least, f"too short: {step}"
