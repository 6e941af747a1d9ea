"""Stream stores of both flavours on the same tables, compared with one model after each step."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import psycopg
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from support.model import FLAVOURS, BothStores, Tables, open_both

from aibind_postgres import (
    AsyncPostgresStreamStore,
    PostgresStreamStore,
    SequenceConflictError,
    StreamExistsError,
    StreamNotActiveError,
    StreamNotFoundError,
)

pytestmark = pytest.mark.timeout(1800)

# The unit of time is an hour, which is long compared with the duration of a run.
HOUR = 3600
TTL = 10

IDS = st.sampled_from(["a", "b", "ü '; --"])
TEXTS = st.sampled_from(["x", "y", "", "👩‍👩‍👧 \x01\ufffe", '"\\{}%s$1'])
# Few different texts, so that random batches often repeat stored ones.
BATCHES = st.lists(TEXTS, max_size=3)
FLAVOUR = st.sampled_from(FLAVOURS)


@dataclass
class Stream:
    created: int
    state: str = "active"
    error: str | None = None
    chunks: list[tuple[str, int]] = field(default_factory=list)  # each with the hour of its append
    ended: int = 0

    @property
    def texts(self) -> list[str]:
        return [text for text, _ in self.chunks]

    @property
    def last_activity(self) -> int:
        return self.chunks[-1][1] if self.chunks else self.created

    def append(self, id: str, texts: list[str], expected: int | None, now: int) -> int:
        """Append as the store does: return the last number or raise."""
        if texts and expected is not None and self.texts[expected - 1 : expected - 1 + len(texts)] == texts:
            return expected + len(texts) - 1
        if self.state != "active":
            raise StreamNotActiveError(id, self.state)
        if expected not in (None, len(self.chunks) + 1):
            raise SequenceConflictError(id, expected, len(self.chunks) + 1)
        self.chunks += [(text, now) for text in texts]
        return len(self.chunks)

    def end(self, state: str, error: str | None, now: int) -> bool:
        if self.state != "active":
            return False
        self.state, self.error, self.ended = state, error, now
        return True


def outcome(call):
    """Return the result of a call, or the type and the text of its error."""
    try:
        return call()
    except (SequenceConflictError, StreamExistsError, StreamNotActiveError, StreamNotFoundError, TimeoutError) as error:
        return type(error), str(error)


class Streams(RuleBasedStateMachine):
    def __init__(self, stores: BothStores, tables: Tables) -> None:
        super().__init__()
        self.stores = stores
        self.tables = tables
        self.now = 0
        self.model: dict[str, Stream] = {}
        tables.run("DELETE FROM {status}")
        tables.run("DELETE FROM {chunks}")

    def get_stream(self, id: str) -> Stream:
        if id not in self.model:
            raise StreamNotFoundError(id)
        return self.model[id]

    def check(self, flavour: str, expected, method: str, *arguments, **options) -> None:
        """Assert that the store and the model have the same outcome."""
        assert outcome(lambda: self.stores.call(flavour, method, *arguments, **options)) == outcome(expected)

    @rule(flavour=FLAVOUR, id=IDS, method=st.sampled_from(["create", "acquire"]))
    def create_or_acquire(self, flavour, id, method):
        def expected():
            if id in self.model:
                if method == "create":
                    raise StreamExistsError(id)
                return False
            self.model[id] = Stream(self.now)
            return id if method == "create" else True

        self.check(flavour, expected, method, id)

    @rule(flavour=FLAVOUR, id=IDS, text=TEXTS)
    def append(self, flavour, id, text):
        self.check(flavour, lambda: self.get_stream(id).append(id, [text], None, self.now), "append", id, text)

    @rule(flavour=FLAVOUR, id=IDS, texts=BATCHES)
    def append_many(self, flavour, id, texts):
        self.check(flavour, lambda: self.get_stream(id).append(id, texts, None, self.now), "append_many", id, texts)

    @rule(flavour=FLAVOUR, id=IDS, texts=BATCHES.filter(bool), repeats=st.integers(1, 3))
    def append_at_the_right_number(self, flavour, id, texts, repeats):
        """A retry of an acknowledged append writes nothing, on either store."""
        number = len(self.model[id].chunks) + 1 if id in self.model else 1
        for _ in range(repeats):
            expected = partial(lambda: self.get_stream(id).append(id, texts, number, self.now))
            if len(texts) == 1:
                self.check(flavour, expected, "append", id, texts[0], expected_seq=number)
            else:
                self.check(flavour, expected, "append_many", id, texts, expected_seq=number)
            flavour = FLAVOURS[FLAVOURS.index(flavour) - 1]

    @rule(flavour=FLAVOUR, id=IDS, texts=BATCHES, number=st.integers(1, 9))
    def append_at_some_number(self, flavour, id, texts, number):
        def expected():
            return self.get_stream(id).append(id, texts, number, self.now)

        self.check(flavour, expected, "append_many", id, texts, expected_seq=number)

    @rule(flavour=FLAVOUR, id=IDS, index=st.integers(0, 30), length=st.integers(1, 3))
    def append_stored_texts(self, flavour, id, index, length):
        if id in self.model and (texts := self.model[id].texts):
            index %= len(texts)
            repeated = texts[index : index + length]
            expected = partial(self.model[id].append, id, repeated, index + 1, self.now)
            self.check(flavour, expected, "append_many", id, repeated, expected_seq=index + 1)

    @rule(flavour=FLAVOUR, id=IDS, texts=BATCHES, fails=st.booleans())
    def write(self, flavour, id, texts, fails):
        def expected():
            stream = self.get_stream(id)
            if stream.state != "active":
                raise StreamNotActiveError(id, stream.state)
            stream.append(id, texts, None, self.now)
            stream.end(*(("error", "the block failed") if fails else ("done", None)), self.now)

        def call():
            try:
                if flavour == "async":
                    self.stores.loop.run_until_complete(self.write_async(id, texts, fails))
                    return
                with self.stores.stores[flavour].writer(id) as writer:
                    for text in texts:
                        writer.write(text)
                    if fails:
                        raise ZeroDivisionError("the block failed")
            except ZeroDivisionError:
                assert fails

        assert outcome(call) == outcome(expected)

    async def write_async(self, id, texts, fails):
        async with self.stores.stores["async"].writer(id) as writer:
            for text in texts:
                await writer.write(text)
            if fails:
                raise ZeroDivisionError("the block failed")

    @rule(flavour=FLAVOUR, id=IDS, end=st.sampled_from([("stop", "stopped"), ("complete", "done"), ("fail", "error")]))
    def end(self, flavour, id, end):
        method, state = end
        reason = ["why"] if method == "fail" else []
        self.check(flavour, lambda: self.get_stream(id).end(state, *(reason or [None]), self.now), method, id, *reason)

    @rule(flavour=FLAVOUR, id=IDS)
    def delete(self, flavour, id):
        self.check(flavour, lambda: self.model.pop(id, None) is not None, "delete", id)

    @rule(hours=st.integers(1, 2 * TTL))
    def advance_time(self, hours):
        self.now += hours
        self.tables.run(
            "UPDATE {status} SET expires_at = expires_at - $1::bigint * 1000, "
            "created_at = created_at - $1 * interval '1 second'",
            hours * HOUR,
        )
        self.tables.run("UPDATE {chunks} SET created_at = created_at - $1 * interval '1 second'", hours * HOUR)

    @rule(flavour=FLAVOUR)
    def cleanup(self, flavour):
        def expected():
            expired = [
                id for id, stream in self.model.items() if stream.state != "active" and self.now - stream.ended >= TTL
            ]
            return len(expired), sum(len(self.model.pop(id).chunks) for id in expired)

        self.check(flavour, expected, "cleanup")

    @rule(flavour=FLAVOUR, hours=st.integers(0, 2 * TTL))
    def fail_abandoned(self, flavour, hours):
        silent = {
            id
            for id, stream in self.model.items()
            if stream.state == "active" and self.now - stream.last_activity >= hours
        }
        text = f"abandoned: no chunk for {hours * HOUR:g} seconds"
        assert set(self.stores.call(flavour, "fail_abandoned", hours * HOUR)) == silent
        for id in silent:
            self.model[id].end("error", text, self.now)

    @rule(flavour=FLAVOUR, state=st.sampled_from([None, "active", "done", "stopped", "error"]))
    def list(self, flavour, state):
        listed = [(info.id, *info[1:4]) for info in self.stores.call(flavour, "list", state=state)]
        assert listed == [
            (id, stream.state, stream.error, len(stream.chunks))
            for id, stream in sorted(self.model.items())
            if state in (None, stream.state)
        ]

    @rule(flavour=FLAVOUR, id=IDS)
    def get_status_and_wait(self, flavour, id):
        stream = self.model.get(id)
        status = None if stream is None else (stream.state, stream.error, len(stream.chunks))
        assert self.stores.call(flavour, "get_status", id) == status

        def expected():
            if self.get_stream(id).state == "active":
                raise TimeoutError(f"stream {id!r} is still active")
            return status

        self.check(flavour, expected, "wait", id, 0)

    @rule(flavour=FLAVOUR, id=IDS, after=st.integers(0, 12), follow=st.booleans())
    def read(self, flavour, id, after, follow):
        stream = self.model.get(id)
        follow = follow and (stream is None or stream.state != "active")

        def chunks():
            return [*enumerate(self.get_stream(id).texts, 1)][after:]

        self.check(flavour, chunks, "read_from", id, after, follow=follow)
        self.check(flavour, chunks, "replay", id, after, speed=float("inf"))

    @invariant()
    def tables_match_model(self):
        status = self.tables.run("SELECT id, state, error, total_chunks FROM {status}")
        assert {row[0]: row[1:] for row in status} == {
            id: (stream.state, stream.error, len(stream.chunks)) for id, stream in self.model.items()
        }
        chunks = {(id, seq): data for id, seq, data in self.tables.run("SELECT id, seq, data FROM {chunks}")}
        assert chunks == {
            (id, seq): text for id, stream in self.model.items() for seq, text in enumerate(stream.texts, 1)
        }


def test_both_flavours_match_the_model(dsn, tables, long):
    names = {"status": tables["status_table"], "chunks": tables["chunks_table"]}
    with (
        open_both(dsn, PostgresStreamStore, AsyncPostgresStreamStore, ttl=TTL * HOUR, **tables) as stores,
        psycopg.connect(dsn, autocommit=True) as connection,
    ):
        run_state_machine_as_test(
            partial(Streams, stores, Tables(connection, **names)),
            settings=settings(
                deadline=None, derandomize=True, max_examples=2000 if long else 40, stateful_step_count=50
            ),
        )
