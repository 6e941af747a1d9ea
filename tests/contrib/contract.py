"""The behaviour of a store on any client, once for threads and once for tasks.

`ours` is the store on the client under test, `theirs` a store on a connection string, as in another process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from support.concurrency import AsyncBackground, Background, async_gather, async_sleep, async_until, gather, until
from support.sessions import TERMINATE, read_only_sessions

from aibind_postgres import (
    AsyncHousekeeper,
    AsyncPostgresConversationStore,
    AsyncPostgresStreamStore,
    ChatHistory,
    ConversationConflictError,
    Housekeeper,
    PostgresConversationStore,
    PostgresStreamStore,
    SchemaError,
    SequenceConflictError,
    StreamExistsError,
    StreamNotActiveError,
    StreamNotFoundError,
)
from aibind_postgres._async import psycopg_clients as async_client
from aibind_postgres._pages import Page
from aibind_postgres._sql import StreamStatements, json_text
from aibind_postgres._sqlstate import READ_ONLY_TRANSACTION, sqlstate
from aibind_postgres._sync import psycopg_clients as sync_client
from aibind_postgres._tables import parse_distinct
from aibind_postgres.schema import async_migrate, migrate

TEXTS = ["", "plain", "é 👩‍👩‍👧", "'; --", '"\\\n\t', "100%", "%s %(p1)s %%", "$1 :p1 ::text \\:x", "x" * 100_000]

NO_CODE = "none"  # of errors without an SQLSTATE, as of connections that could not be opened

SERVER_TIME = "SELECT extract(epoch FROM clock_timestamp())::float8"
TTL = 1800  # seconds, the default of a conversation store
ROUNDING = 0.001  # seconds, since expires_at is rounded to milliseconds

NAMES = ['we"ird', "we:ird", "we::ird", "we$1ird", "100%", "%(p1)s", "back\\:slash\\", "it's -- /* $1", "{0} ?"]


def hostile(schema_name: str, name: str) -> dict[str, psycopg.sql.Identifier]:
    """Return table names for a store, each with `name` in it."""
    kinds = ("chunks", "status")
    return {f"{kind}_table": psycopg.sql.Identifier(schema_name, f"{name} {kind}") for kind in kinds}


def parameters(dsn: str, **names: str) -> dict[str, Any]:
    """Return a connection string as keyword arguments of another driver, renamed by `names`."""
    found = conninfo_to_dict(dsn)
    return {names.get(name, name): value for name, value in found.items() if value}


@contextmanager
def ending(store: PostgresStreamStore, id: str) -> Iterator[None]:
    """Stop a stream at the end, so that a failing test does not wait for its readers."""
    try:
        yield
    finally:
        store.stop(id)


@asynccontextmanager
async def async_ending(store: AsyncPostgresStreamStore, id: str) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await store.stop(id)


def server_time(client: Any) -> float:
    """Return the seconds since the epoch by the clock of the server."""
    with sync_client.as_client(client) as runner:
        [[seconds]] = runner.query(SERVER_TIME, [])
    return float(seconds)


async def async_server_time(client: Any) -> float:
    async with async_client.as_client(client) as runner:
        [[seconds]] = await runner.query(SERVER_TIME, [])
    return float(seconds)


def round_trip(
    ours: PostgresStreamStore,
    client: Any,
    tables: dict[str, Any],
    at_thread_end: Callable[[], None] = lambda: None,
) -> None:
    """Use every statement. `client` and `tables` are those of the store. Threads call `at_thread_end` at their end."""
    before = server_time(client)
    id = ours.create()
    with pytest.raises(StreamExistsError):
        ours.create(id)
    assert ours.acquire(id) is False
    for seq, text in enumerate(TEXTS, start=1):
        assert ours.append(id, text) == seq
    last = ours.append_many(id, TEXTS, expected_seq=len(TEXTS) + 1)
    assert last == 2 * len(TEXTS)
    expected = list(enumerate(TEXTS * 2, start=1))
    assert list(ours.read_from(id, follow=False)) == expected
    assert list(ours.read_from(id, last - 1, follow=False)) == expected[-1:]
    assert list(ours.replay(id, speed=1000)) == expected
    assert list(ours.events(id, follow=False)) == [(seq, "message", text) for seq, text in expected]
    timed = list(ours.read_with_times(id))
    assert [(chunk.seq, chunk.data) for chunk in timed] == expected
    assert all(chunk.created_at and before - 1 < chunk.created_at.timestamp() for chunk in timed)

    assert ours.append(id, TEXTS[-1], expected_seq=last) == last
    assert ours.append_many(id, TEXTS, expected_seq=len(TEXTS) + 1) == last
    with pytest.raises(SequenceConflictError):
        ours.append(id, "other", expected_seq=last)
    assert ours.get_status(id) == ("active", None, last)

    other, failed = ours.create(), ours.create()
    assert ours.stop(id) is True
    assert ours.complete(id) is False
    assert ours.complete(other) is True
    assert ours.fail(failed, "100% :p1 $1") is True
    assert ours.wait(failed) == ("error", "100% :p1 $1", 0)
    with pytest.raises(StreamNotActiveError):
        ours.append(id, "more")

    after = server_time(client)
    infos = {info.id: info for info in ours.list()}
    assert {infos[stream_id].state for stream_id in (id, other, failed)} == {"stopped", "done", "error"}
    created_at = infos[id].created_at
    assert created_at is not None
    assert before <= created_at.timestamp() <= after
    since = [info.id for info in ours.list(created_after=created_at, state="error")]
    assert since == [failed]
    assert id not in [info.id for info in ours.list(created_before=created_at)]

    silent = ours.create()
    time.sleep(0.01)
    assert ours.fail_abandoned(3600) == []
    assert ours.fail_abandoned(0.001) == [silent]
    archived = ours.archive(0)
    assert archived.streams >= 4
    assert archived.chunks >= last
    assert list(ours.read_from(id)) == expected
    assert list(ours.read_with_times(id)) == timed
    assert ours.append_many(id, TEXTS, expected_seq=len(TEXTS) + 1) == last
    assert ours.unarchive(id) == last
    assert list(ours.read_with_times(id)) == timed
    assert ours.cleanup() == (0, 0)
    assert ours.delete(id) is True
    assert ours.delete(id) is False
    with pytest.raises(StreamNotFoundError):
        ours.stop(id)
    with pytest.raises(StreamNotFoundError):
        ours.append(id, "more")
    check_combined(ours, client, tables, at_thread_end)


def check_combined(
    ours: PostgresStreamStore, client: Any, tables: dict[str, Any], at_thread_end: Callable[[], None]
) -> None:
    """Use the statements that simultaneous callers share, and a stream writer."""
    one, two, three = ours.create(), ours.create(), ours.create()
    ours.stop(three)

    def ending_thread(call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            try:
                return call()
            finally:
                at_thread_end()

        return run

    for _ in range(6):  # often enough that the driver prepares the statements
        before = ours.get_status(one).total_chunks
        singles = [ending_thread(partial(ours.append, one, text)) for text in TEXTS]
        several = ending_thread(partial(ours.append_many, one, TEXTS))
        expected = ending_thread(partial(ours.append, two, "first", expected_seq=1))
        late = ending_thread(partial(ours.append, three, "too late"))
        *numbers, last, first, refused = gather(*singles, several, expected, late, errors=True)
        assert sorted({*numbers, *range(last - len(TEXTS) + 1, last + 1)}) == list(
            range(before + 1, before + 2 * len(TEXTS) + 1)
        )
        assert first == 1
        assert isinstance(refused, StreamNotActiveError)
        stored = {chunk.seq: chunk.data for chunk in ours.read_from(one, before, follow=False)}
        assert [stored[number] for number in numbers] == TEXTS
        assert [stored[number] for number in range(last - len(TEXTS) + 1, last + 1)] == TEXTS
        assert ours.delete(two) is True
        ours.create(two)
    total = ours.append(one, TEXTS[-1])
    batch = batch_of_reads(tables, {one: total - 1, two: 0, "missing": 0})
    with sync_client.as_client(client) as runner:
        # A store shares this statement only by chance, and it must run on every driver. Citus refuses it.
        for _ in range(0 if ours._database.is_distributed else 6):
            check_batch(runner.query(*batch), total)
    with ours.writer(two) as writer:
        for text in TEXTS:
            writer.write(text)
        assert writer.flush() == len(TEXTS)
    assert list(ours.read_from(two)) == list(enumerate(TEXTS, start=1))
    assert ours.get_status(two) == ("done", None, len(TEXTS))
    ours.complete(one)


def batch_of_reads(tables: dict[str, Any], positions: dict[str, int]) -> tuple[str, list[Any]]:
    """Return the statement that reads several streams, each after a number, and its parameters."""
    statements = StreamStatements(*parse_distinct(tables["chunks_table"], tables["status_table"]))
    items = [
        {"index": index, "id": id, "after": after, "limit": 1} for index, (id, after) in enumerate(positions.items())
    ]
    return statements.read_batch, [json_text(items)]


def check_batch(rows: Sequence[Any], total: int) -> None:
    """Check the rows of a stream of which one chunk was to be read, of an empty stream and of a missing one."""
    found: list[list[Any]] = [[], [], []]
    for index, *row in rows:
        found[index].append(tuple(row))
    page, empty, missing = [Page.parse(rows, 0, 1) for rows in found]
    assert page is not None
    assert (page.state, page.error, page.total, page.rows) == ("active", None, total, [(total, TEXTS[-1])])
    assert empty is not None
    assert (empty.state, empty.error, empty.total, empty.rows) == ("active", None, 0, [])
    assert missing is None


def check_conversations(ours: PostgresConversationStore, client: Any) -> None:
    """Use every statement of a conversation store. `client` is that of the store."""
    document = {"content": TEXTS}
    with ours.edit("s") as chat:
        chat.append(document)
    for number in range(6):  # so often that the driver prepares it
        stale = ours.load("s")
        with ours.edit("s") as chat:
            chat.append(number)
        stale.append("merged")
        with pytest.raises(ConversationConflictError):
            ours.save("s", stale, on_conflict="raise")
        ours.save("s", stale)
        stale.append("and on")
        ours.save("s", stale, on_conflict="raise")
        assert ours.touch("s") is True
    again = ours.load("s")
    assert len(again) == 1 + 3 * 6
    assert again.messages[0] == document
    copied = ChatHistory.from_json(again.to_json())
    before = server_time(client)
    for number in range(6):
        ours.save(f"%s {number} :p1", copied, on_conflict="overwrite", owner="ann")
        assert ours.describe(f"%s {number} :p1", title=f"%s {number}", metadata={"a": number}) is True
    after = server_time(client)
    infos = list(ours.list())
    assert [info.session_id for info in infos] == [*(f"%s {number} :p1" for number in reversed(range(6))), "s"]
    assert infos[0].expires_at is not None
    assert before + TTL - ROUNDING <= infos[0].expires_at.timestamp() <= after + TTL + ROUNDING
    assert infos[0][1:4] == ("ann", "%s 5", {"a": 5})
    assert before - ROUNDING <= infos[0].updated_at.timestamp() <= after + ROUNDING
    for number in range(6):
        assert list(ours.list("ann", limit=2, before=infos[number])) == infos[number + 1 : 6][:2]
        assert ours.get_info(infos[number].session_id) == infos[number]
    assert ours.delete_owner("ann", streams=None) == (6, 0)
    assert ours.delete("s") is True
    assert ours.delete("s") is False
    assert ours.cleanup() == 0


def check_housekeeping(ours: PostgresStreamStore, chats: PostgresConversationStore, caplog: Any) -> None:
    """Clean up, and leave the next turn to others. The ttl of both stores must be a millisecond."""
    caplog.set_level(logging.INFO, logger="aibind_postgres")
    # Not a generated id: partitions by time keep an expired stream until its day is over.
    ours.complete(ours.create("id"))
    chats.save("s", ChatHistory())
    time.sleep(0.01)
    with Housekeeper(ours, chats):
        until(lambda: len(caplog.records) >= 2)
        time.sleep(0.1)  # another record would be of a failure
    assert [record.getMessage().partition('": ')[2] for record in caplog.records] == [
        "streams deleted: 1",
        "conversations deleted: 1",
    ]


def check_following(
    ours: PostgresStreamStore, theirs: PostgresStreamStore, at_thread_end: Callable[[], None] = lambda: None
) -> None:
    """Follow the chunks of two stores in threads, each of which calls `at_thread_end` at its end."""
    id = ours.create()

    def follow() -> list[Any]:
        try:
            return list(ours.read_from(id))
        finally:
            at_thread_end()

    def wait() -> Any:
        try:
            return ours.wait(id, timeout=30)
        finally:
            at_thread_end()

    with Background(follow) as reader, Background(wait) as waiter, ending(theirs, id):
        for seq in range(1, 21):
            assert (ours if seq % 2 else theirs).append(id, f"{seq}") == seq
            time.sleep(0.01)
        assert theirs.complete(id) is True
        assert reader.result() == [(seq, f"{seq}") for seq in range(1, 21)]
        assert waiter.result() == ("done", None, 20)


def check_notification(
    ours: PostgresStreamStore, theirs: PostgresStreamStore, at_thread_end: Callable[[], None] = lambda: None
) -> None:
    """Read chunks of `theirs` as they are notified. `ours` must have a `poll_interval` of an hour."""
    id = theirs.create()
    arrived: list[str] = []

    def follow() -> None:
        try:
            for chunk in ours.read_from(id):
                arrived.append(chunk.data)
        finally:
            at_thread_end()

    with Background(follow) as reader, ending(theirs, id):
        theirs.append(id, "the reader is there")
        until(lambda: len(arrived) == 1)
        time.sleep(1)  # until it waits, and the listener is connected
        theirs.append(id, "now")
        until(lambda: len(arrived) == 2)
        theirs.complete(id)
        reader.result()


def check_reconnect(
    ours: PostgresStreamStore, theirs: PostgresStreamStore, dsn: str, at_thread_end: Callable[[], None] = lambda: None
) -> None:
    """Continue to read after the server has ended every connection except those of `theirs`."""
    id = ours.create()
    arrived: list[str] = []

    def follow() -> None:
        try:
            for chunk in ours.read_from(id):
                arrived.append(chunk.data)
        finally:
            at_thread_end()

    with Background(follow) as reader, ending(theirs, id):
        for number in range(5):
            theirs.append(id, f"{number}")
            until(lambda number=number: len(arrived) > number)
            with psycopg.connect(dsn, autocommit=True) as admin:
                admin.execute(TERMINATE)
        theirs.complete(id)
        reader.result()
    assert arrived == ["0", "1", "2", "3", "4"]


def check_read_only(ours: PostgresStreamStore, dsn: str, at_thread_end: Callable[[], None] = lambda: None) -> None:
    """Retry a write while the server is read-only, and replace the sessions that stay so."""
    id, other = ours.create(), ours.create()
    entered: list[bool] = []
    read_only: list[bool] = []

    def write() -> None:
        try:
            with ours.writer(id) as writer:
                entered.append(True)
                until(lambda: read_only)
                writer.write("a")
        finally:
            at_thread_end()

    with Background(write) as writing:
        until(lambda: entered)
        with read_only_sessions(dsn):
            read_only.append(True)
            until(lambda: _code_of_append(ours, other) == READ_ONLY_TRANSACTION)
        until(lambda: _code_of_append(ours, other) is None)
        writing.result()
    assert ours.wait(id) == ("done", None, 1)


def _code_of_append(store: PostgresStreamStore, id: str) -> str | None:
    try:
        store.append(id, "a")
    except Exception as error:
        return sqlstate(error) or NO_CODE
    return None


def missing_tables(client: Any) -> None:
    """Raise `SchemaError` with the name of the missing table."""
    with PostgresStreamStore(client, status_table="no such:table", chunks_table="nor this") as store:
        for call in (store.create, lambda: store.append("x", "y"), lambda: list(store.read_from("x"))):
            with pytest.raises(SchemaError, match="no such:table"):
                call()


def hostile_names(
    client: Any, tables: dict[str, psycopg.sql.Identifier], at_thread_end: Callable[[], None] = lambda: None
) -> None:
    """Create tables with these names and use them. The client must not be in a transaction."""
    conversations = psycopg.sql.Identifier(*tables["status_table"]._obj[:-1], "100% c:onversations $1")
    for _ in range(2):
        migrate(client, **tables, conversations_table=conversations, notify_trigger=True)
    with PostgresStreamStore(client, **tables) as store:
        round_trip(store, client, tables, at_thread_end)


async def async_round_trip(ours: AsyncPostgresStreamStore, client: Any, tables: dict[str, Any]) -> None:
    before = await async_server_time(client)
    id = await ours.create()
    with pytest.raises(StreamExistsError):
        await ours.create(id)
    assert await ours.acquire(id) is False
    for seq, text in enumerate(TEXTS, start=1):
        assert await ours.append(id, text) == seq
    last = await ours.append_many(id, TEXTS, expected_seq=len(TEXTS) + 1)
    assert last == 2 * len(TEXTS)
    expected = list(enumerate(TEXTS * 2, start=1))
    assert [chunk async for chunk in ours.read_from(id, follow=False)] == expected
    assert [chunk async for chunk in ours.read_from(id, last - 1, follow=False)] == expected[-1:]
    assert [chunk async for chunk in ours.replay(id, speed=1000)] == expected
    assert [e async for e in ours.events(id, follow=False)] == [(seq, "message", text) for seq, text in expected]
    timed = [chunk async for chunk in ours.read_with_times(id)]
    assert [(chunk.seq, chunk.data) for chunk in timed] == expected
    assert all(chunk.created_at and before - 1 < chunk.created_at.timestamp() for chunk in timed)

    assert await ours.append(id, TEXTS[-1], expected_seq=last) == last
    assert await ours.append_many(id, TEXTS, expected_seq=len(TEXTS) + 1) == last
    with pytest.raises(SequenceConflictError):
        await ours.append(id, "other", expected_seq=last)
    assert await ours.get_status(id) == ("active", None, last)

    other, failed = await ours.create(), await ours.create()
    assert await ours.stop(id) is True
    assert await ours.complete(id) is False
    assert await ours.complete(other) is True
    assert await ours.fail(failed, "100% :p1 $1") is True
    assert await ours.wait(failed) == ("error", "100% :p1 $1", 0)
    with pytest.raises(StreamNotActiveError):
        await ours.append(id, "more")

    after = await async_server_time(client)
    infos = {info.id: info async for info in ours.list()}
    assert {infos[stream_id].state for stream_id in (id, other, failed)} == {"stopped", "done", "error"}
    created_at = infos[id].created_at
    assert created_at is not None
    assert before <= created_at.timestamp() <= after
    since = [info.id async for info in ours.list(created_after=created_at, state="error")]
    assert since == [failed]
    assert id not in [info.id async for info in ours.list(created_before=created_at)]

    silent = await ours.create()
    await async_sleep(0.01)
    assert await ours.fail_abandoned(3600) == []
    assert await ours.fail_abandoned(0.001) == [silent]
    archived = await ours.archive(0)
    assert archived.streams >= 4
    assert archived.chunks >= last
    assert [chunk async for chunk in ours.read_from(id)] == expected
    assert [chunk async for chunk in ours.read_with_times(id)] == timed
    assert await ours.append_many(id, TEXTS, expected_seq=len(TEXTS) + 1) == last
    assert await ours.unarchive(id) == last
    assert [chunk async for chunk in ours.read_with_times(id)] == timed
    assert await ours.cleanup() == (0, 0)
    assert await ours.delete(id) is True
    assert await ours.delete(id) is False
    with pytest.raises(StreamNotFoundError):
        await ours.stop(id)
    with pytest.raises(StreamNotFoundError):
        await ours.append(id, "more")
    await async_check_combined(ours, client, tables)


async def async_check_combined(ours: AsyncPostgresStreamStore, client: Any, tables: dict[str, Any]) -> None:
    one, two, three = await ours.create(), await ours.create(), await ours.create()
    await ours.stop(three)

    for _ in range(6):
        before = (await ours.get_status(one)).total_chunks
        singles = [partial(ours.append, one, text) for text in TEXTS]
        several = partial(ours.append_many, one, TEXTS)
        expected = partial(ours.append, two, "first", expected_seq=1)
        late = partial(ours.append, three, "too late")
        *numbers, last, first, refused = await async_gather(*singles, several, expected, late, errors=True)
        assert sorted({*numbers, *range(last - len(TEXTS) + 1, last + 1)}) == list(
            range(before + 1, before + 2 * len(TEXTS) + 1)
        )
        assert first == 1
        assert isinstance(refused, StreamNotActiveError)
        stored = {chunk.seq: chunk.data async for chunk in ours.read_from(one, before, follow=False)}
        assert [stored[number] for number in numbers] == TEXTS
        assert [stored[number] for number in range(last - len(TEXTS) + 1, last + 1)] == TEXTS
        assert await ours.delete(two) is True
        await ours.create(two)
    total = await ours.append(one, TEXTS[-1])
    batch = batch_of_reads(tables, {one: total - 1, two: 0, "missing": 0})
    async with async_client.as_client(client) as runner:
        for _ in range(0 if ours._database.is_distributed else 6):
            check_batch(await runner.query(*batch), total)
    async with ours.writer(two) as writer:
        for text in TEXTS:
            await writer.write(text)
        assert await writer.flush() == len(TEXTS)
    assert [chunk async for chunk in ours.read_from(two)] == list(enumerate(TEXTS, start=1))
    assert await ours.get_status(two) == ("done", None, len(TEXTS))
    await ours.complete(one)


async def async_check_conversations(ours: AsyncPostgresConversationStore, client: Any) -> None:
    document = {"content": TEXTS}
    async with ours.edit("s") as chat:
        chat.append(document)
    for number in range(6):  # so often that the driver prepares it
        stale = await ours.load("s")
        async with ours.edit("s") as chat:
            chat.append(number)
        stale.append("merged")
        with pytest.raises(ConversationConflictError):
            await ours.save("s", stale, on_conflict="raise")
        await ours.save("s", stale)
        stale.append("and on")
        await ours.save("s", stale, on_conflict="raise")
        assert await ours.touch("s") is True
    again = await ours.load("s")
    assert len(again) == 1 + 3 * 6
    assert again.messages[0] == document
    copied = ChatHistory.from_json(again.to_json())
    before = await async_server_time(client)
    for number in range(6):
        await ours.save(f"%s {number} :p1", copied, on_conflict="overwrite", owner="ann")
        assert await ours.describe(f"%s {number} :p1", title=f"%s {number}", metadata={"a": number}) is True
    after = await async_server_time(client)
    infos = [info async for info in ours.list()]
    assert [info.session_id for info in infos] == [*(f"%s {number} :p1" for number in reversed(range(6))), "s"]
    assert infos[0].expires_at is not None
    assert before + TTL - ROUNDING <= infos[0].expires_at.timestamp() <= after + TTL + ROUNDING
    assert infos[0][1:4] == ("ann", "%s 5", {"a": 5})
    assert before - ROUNDING <= infos[0].updated_at.timestamp() <= after + ROUNDING
    for number in range(6):
        page = [info async for info in ours.list("ann", limit=2, before=infos[number])]
        assert page == infos[number + 1 : 6][:2]
        assert await ours.get_info(infos[number].session_id) == infos[number]
    assert await ours.delete_owner("ann", streams=None) == (6, 0)
    assert await ours.delete("s") is True
    assert await ours.delete("s") is False
    assert await ours.cleanup() == 0


async def async_check_housekeeping(
    ours: AsyncPostgresStreamStore, chats: AsyncPostgresConversationStore, caplog: Any
) -> None:
    caplog.set_level(logging.INFO, logger="aibind_postgres")
    # Not a generated id: partitions by time keep an expired stream until its day is over.
    await ours.complete(await ours.create("id"))
    await chats.save("s", ChatHistory())
    await async_sleep(0.01)
    async with AsyncHousekeeper(ours, chats):
        await async_until(lambda: len(caplog.records) >= 2)
        await async_sleep(0.1)
    assert [record.getMessage().partition('": ')[2] for record in caplog.records] == [
        "streams deleted: 1",
        "conversations deleted: 1",
    ]


async def async_check_following(ours: AsyncPostgresStreamStore, theirs: AsyncPostgresStreamStore) -> None:
    id = await ours.create()

    async def follow() -> list[Any]:
        return [chunk async for chunk in ours.read_from(id)]

    async def wait() -> Any:
        return await ours.wait(id, timeout=30)

    async with AsyncBackground(follow) as reader, AsyncBackground(wait) as waiter, async_ending(theirs, id):
        for seq in range(1, 21):
            assert await (ours if seq % 2 else theirs).append(id, f"{seq}") == seq
            await async_sleep(0.01)
        assert await theirs.complete(id) is True
        assert await reader.result() == [(seq, f"{seq}") for seq in range(1, 21)]
        assert await waiter.result() == ("done", None, 20)


async def async_check_notification(ours: AsyncPostgresStreamStore, theirs: AsyncPostgresStreamStore) -> None:
    id = await theirs.create()
    arrived: list[str] = []

    async def follow() -> None:
        async for chunk in ours.read_from(id):
            arrived.append(chunk.data)

    async with AsyncBackground(follow) as reader, async_ending(theirs, id):
        await theirs.append(id, "the reader is there")
        await async_until(lambda: len(arrived) == 1)
        await async_sleep(1)
        await theirs.append(id, "now")
        await async_until(lambda: len(arrived) == 2)
        await theirs.complete(id)
        await reader.result()


async def async_check_reconnect(ours: AsyncPostgresStreamStore, theirs: AsyncPostgresStreamStore, dsn: str) -> None:
    id = await ours.create()
    arrived: list[str] = []

    async def follow() -> None:
        async for chunk in ours.read_from(id):
            arrived.append(chunk.data)

    async with AsyncBackground(follow) as reader, async_ending(theirs, id):
        for number in range(5):
            await theirs.append(id, f"{number}")
            await async_until(lambda number=number: len(arrived) > number)
            async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as admin:
                await admin.execute(TERMINATE)
        await theirs.complete(id)
        await reader.result()
    assert arrived == ["0", "1", "2", "3", "4"]


async def async_check_read_only(ours: AsyncPostgresStreamStore, dsn: str, code: str = READ_ONLY_TRANSACTION) -> None:
    id, other = await ours.create(), await ours.create()
    entered: list[bool] = []
    read_only: list[bool] = []

    async def write() -> None:
        async with ours.writer(id) as writer:
            entered.append(True)
            await async_until(lambda: read_only)
            await writer.write("a")

    async with AsyncBackground(write) as writing:
        await async_until(lambda: entered)
        with read_only_sessions(dsn):
            read_only.append(True)
            while await _async_code_of_append(ours, other) != code:
                await async_sleep(0.002)
        while await _async_code_of_append(ours, other) is not None:
            await async_sleep(0.002)
        await writing.result()
    assert await ours.wait(id) == ("done", None, 1)


async def _async_code_of_append(store: AsyncPostgresStreamStore, id: str) -> str | None:
    try:
        await store.append(id, "a")
    except Exception as error:
        return sqlstate(error) or NO_CODE
    return None


async def async_missing_tables(client: Any) -> None:
    async with AsyncPostgresStreamStore(client, status_table="no such:table", chunks_table="nor this") as store:
        with pytest.raises(SchemaError, match="no such:table"):
            await store.create()
        with pytest.raises(SchemaError, match="no such:table"):
            await store.append("x", "y")
        with pytest.raises(SchemaError, match="no such:table"):
            await anext(store.read_from("x"))


async def async_hostile_names(client: Any, tables: dict[str, psycopg.sql.Identifier]) -> None:
    conversations = psycopg.sql.Identifier(*tables["status_table"]._obj[:-1], "100% c:onversations $1")
    for _ in range(2):
        await async_migrate(client, **tables, conversations_table=conversations, notify_trigger=True)
    async with AsyncPostgresStreamStore(client, **tables) as store:
        await async_round_trip(store, client, tables)
