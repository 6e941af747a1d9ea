"""Types of the public API. Checked by mypy, never run.

A line with `type: ignore` is wrong on purpose. An ignore without an error makes mypy fail.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, TypedDict

import psycopg
from psycopg.rows import DictRow, dict_row
from psycopg.sql import Identifier
from psycopg_pool import AsyncConnectionPool, ConnectionPool
from typing_extensions import assert_type

from aibind_postgres import (
    ArchiveResult,
    AsyncDurableStream,
    AsyncHousekeeper,
    AsyncPostgresClient,
    AsyncPostgresConversationStore,
    AsyncPostgresStreamStore,
    AsyncStreamHandler,
    AsyncStreamWriter,
    AsyncWebResponse,
    ChatHistory,
    CleanupResult,
    ConversationConflictError,
    ConversationInfo,
    DurableStream,
    ErasureResult,
    Generation,
    Housekeeper,
    InvalidHistoryError,
    MessageNotFoundError,
    MessageTree,
    PostgresClient,
    PostgresConversationStore,
    PostgresStreamStore,
    SequenceConflictError,
    StoreCheck,
    StoredEvent,
    StreamChunk,
    StreamEvent,
    StreamHandler,
    StreamInfo,
    StreamNotActiveError,
    StreamState,
    StreamStatus,
    StreamWriter,
    TimedChunk,
    TreeNode,
    TreePath,
    WebRequest,
    WebResponse,
    embedded,
    schema,
    wrap_asyncpg,
    wrap_django,
    wrap_sqlalchemy,
)
from aibind_postgres.contrib import django as django_app
from aibind_postgres.contrib.opentelemetry import OpenTelemetryMetrics
from aibind_postgres.contrib.prometheus import PrometheusMetrics

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine


class Driver:
    def query(self, sql: str, params: Sequence[Any], /) -> Sequence[Any]:
        return [(sql, params)]


class AsyncDriver:
    async def query(self, sql: str, params: Sequence[Any], /) -> Sequence[Any]:
        return [(sql, params)]


def clients(connection: psycopg.Connection[DictRow], engine: Engine) -> None:
    pool: ConnectionPool[psycopg.Connection[DictRow]] = ConnectionPool(
        "", connection_class=psycopg.Connection[DictRow], kwargs={"row_factory": dict_row}
    )
    own: PostgresClient = Driver()
    for client in ("", pool, connection, own, Driver(), wrap_sqlalchemy(engine), wrap_django("other")):
        PostgresStreamStore(client)
        schema.migrate(client, chunks_table="chunks", notify_trigger=True, partitions=8)
        schema.migrate(client, citus=True)
    assert_type(wrap_sqlalchemy(engine), PostgresClient)
    PostgresStreamStore(AsyncDriver())  # type: ignore[arg-type]
    PostgresStreamStore(wrap_asyncpg(None))  # type: ignore[arg-type]
    schema.migrate("", tables="chunks")  # type: ignore[call-arg]


async def async_clients(
    pool: AsyncConnectionPool, connection: psycopg.AsyncConnection[DictRow], engine: AsyncEngine
) -> None:
    own: AsyncPostgresClient = AsyncDriver()
    AsyncPostgresStreamStore("")
    AsyncPostgresStreamStore(pool)
    AsyncPostgresStreamStore(connection)
    AsyncPostgresStreamStore(own)
    AsyncPostgresStreamStore(AsyncDriver())
    AsyncPostgresStreamStore(wrap_asyncpg(pool))
    AsyncPostgresStreamStore(wrap_sqlalchemy(engine))
    assert_type(wrap_sqlalchemy(engine), AsyncPostgresClient)
    AsyncPostgresStreamStore(Driver())  # type: ignore[arg-type]
    AsyncPostgresStreamStore(pool, replica="")
    AsyncPostgresStreamStore("", replica=wrap_sqlalchemy(engine))
    AsyncPostgresStreamStore("", replica=Driver())  # type: ignore[arg-type]
    await schema.async_migrate(pool, status_table=Identifier("schema", "status"), partitions=None)
    await schema.async_migrate(pool, partitions="time")
    await schema.async_migrate(pool, partitions="day")  # type: ignore[arg-type]


def streams(since: datetime) -> None:
    with PostgresStreamStore(
        "", chunks_table=Identifier("c"), status_table="s", poll_interval=0.1, ttl=timedelta(1), retry_for=1
    ) as store:
        assert_type(store, PostgresStreamStore)
        assert_type(store.create(), str)
        assert_type(store.acquire("id"), bool)
        assert_type(store.append("id", "text", expected_seq=1), int)
        assert_type(store.append_many("id", iter(["text"]), expected_seq=None), int)
        assert_type(store.read_from("id", 3, follow=False), Iterator[StreamChunk])
        assert_type(store.replay("id", after_seq=3, speed=2), Iterator[StreamChunk])
        assert_type(store.events("id", after_seq=3, follow=False), Iterator[StoredEvent])
        assert_type(store.read_with_times("id", after_seq=3), Iterator[TimedChunk])
        assert_type(store.get_status("id"), StreamStatus | None)
        assert_type(store.check(), StoreCheck)
        assert_type(store.get_stats(), dict[str, int])
        assert_type(store.wait("id", timeout=timedelta(seconds=1)), StreamStatus)
        assert_type(store.wait("id").state, StreamState)
        assert_type([store.stop("id"), store.complete("id"), store.fail("id", "why"), store.delete("id")], list[bool])
        assert_type(store.list(state="active", created_after=since), Iterator[StreamInfo])
        assert_type(store.cleanup(), CleanupResult)
        assert_type(store.archive(timedelta(days=1), batch_size=1000), ArchiveResult)
        assert_type(store.unarchive("id"), int)
        assert_type(store.fail_abandoned(600), list[str])
        for seq, data in store.read_from("id"):
            assert_type(seq, int)
            assert_type(data, str)
        for seq, event, data in store.events("id"):
            assert_type((seq, event, data), tuple[int, str, str])
        for seq, data, created_at in store.read_with_times("id"):
            assert_type((seq, data, created_at), tuple[int, str, datetime | None])
        store.append("id", b"bytes")  # type: ignore[arg-type]
        store.list(state="ended")  # type: ignore[arg-type]
        store.replay("id", 0, 2.0)  # type: ignore[call-arg]
        store.close()


async def async_streams(since: datetime) -> None:
    async with AsyncPostgresStreamStore(
        "", chunks_table=Identifier("c"), status_table="s", poll_interval=0.1, ttl=timedelta(1), retry_for=1
    ) as store:
        assert_type(store, AsyncPostgresStreamStore)
        assert_type(await store.create(), str)
        assert_type(await store.acquire("id"), bool)
        assert_type(await store.append("id", "text", expected_seq=1), int)
        assert_type(await store.append_many("id", iter(["text"]), expected_seq=None), int)
        assert_type(store.read_from("id", 3, follow=False), AsyncIterator[StreamChunk])
        assert_type(store.replay("id", after_seq=3, speed=2), AsyncIterator[StreamChunk])
        assert_type(store.events("id", after_seq=3, follow=False), AsyncIterator[StoredEvent])
        assert_type(store.read_with_times("id", after_seq=3), AsyncIterator[TimedChunk])
        assert_type(await store.get_status("id"), StreamStatus | None)
        assert_type(await store.check(timeout=1), StoreCheck)
        assert_type(await store.wait("id", timeout=timedelta(seconds=1)), StreamStatus)
        assert_type([await store.stop("id"), await store.complete("id"), await store.fail("id", "why")], list[bool])
        assert_type(await store.delete("id"), bool)
        assert_type(store.list(state="active", created_after=since), AsyncIterator[StreamInfo])
        assert_type(await store.cleanup(), CleanupResult)
        assert_type(await store.archive(3600), ArchiveResult)
        assert_type(await store.unarchive("id"), int)
        assert_type(await store.fail_abandoned(600), list[str])
        async for seq, data in store.read_from("id"):
            assert_type(seq, int)
            assert_type(data, str)
        async for seq, event, data in store.events("id"):
            assert_type((seq, event, data), tuple[int, str, str])
        async for seq, data, created_at in store.read_with_times("id"):
            assert_type((seq, data, created_at), tuple[int, str, datetime | None])
        await store.append("id", b"bytes")  # type: ignore[arg-type]
        store.list(state="ended")  # type: ignore[arg-type]
        await store.close()


def telemetry() -> None:
    PostgresStreamStore("", metrics=PrometheusMetrics())
    AsyncPostgresStreamStore("", metrics=OpenTelemetryMetrics())
    PostgresStreamStore("", metrics=object())  # type: ignore[arg-type]


def models(status: StreamStatus, info: StreamInfo) -> None:
    assert_type(status.error, str | None)
    assert_type(info.expires_at, datetime)
    assert_type(info.created_at, datetime | None)
    assert_type(schema.render(chunks_table=Identifier("a", "b")), str)
    assert_type(schema.statements(chunks_table=Identifier("a", "b")), list[str])
    assert_type(schema.monitoring_views(status_table="a.b"), str)
    with embedded.server("folder", version=16) as dsn:
        assert_type(dsn, str)
    try:
        PostgresStreamStore("").append("id", "text")
    except SequenceConflictError as conflict:
        assert_type((conflict.expected, conflict.actual), tuple[int, int])
    except StreamNotActiveError as not_active:
        assert_type(not_active.state, str)


def writers(store: PostgresStreamStore) -> None:
    assert_type(store.writer("id", max_chunks=5, max_bytes=100), StreamWriter)
    with store.writer("id") as writer:
        writer.write("chunk")
        writer.text("text")
        writer.event("usage", "{}")
        assert_type(writer.flush(), int)
        assert_type(writer.is_active, bool)
        writer.write(b"chunk")  # type: ignore[arg-type]
        writer.event("usage", {})  # type: ignore[arg-type]
    PostgresStreamStore("", synchronous_commit="off", notify=False)
    PostgresStreamStore("", synchronous_commit="maybe")  # type: ignore[arg-type]


async def async_writers(store: AsyncPostgresStreamStore) -> None:
    assert_type(store.writer("id"), AsyncStreamWriter)
    async with store.writer("id") as writer:
        await writer.write("chunk")
        await writer.text("text")
        await writer.event("usage", "{}")
        assert_type(await writer.flush(), int)


def housekeeping(store: PostgresStreamStore, chats: PostgresConversationStore) -> None:
    with Housekeeper(store, chats, every=timedelta(minutes=10)) as housekeeper:
        assert_type(housekeeper, Housekeeper)
    Housekeeper(None, chats, 60).start()
    Housekeeper(store, archive_after=3600).close()
    Housekeeper("dsn")  # type: ignore[arg-type]


async def async_housekeeping(store: AsyncPostgresStreamStore, chats: AsyncPostgresConversationStore) -> None:
    async with AsyncHousekeeper(store, chats, every=60) as housekeeper:
        assert_type(housekeeper, AsyncHousekeeper)
    await AsyncHousekeeper(None, chats).start()
    Housekeeper(store)  # type: ignore[arg-type]


class Message(TypedDict):
    role: str
    content: str


def histories(message: Message) -> None:
    chat: ChatHistory[Message] = ChatHistory(generate_id=lambda: "id")
    assert_type(chat.append(message, {"model": "m"}), str)
    assert_type([chat.edit("id", message), chat.regenerate("id", message), chat.compact(message)], list[str])
    assert_type(chat.messages, list[Message])
    assert_type(chat.node_ids, list[str])
    assert_type([chat.is_empty, chat.has_alternatives("id")], list[bool])
    assert_type([len(chat), chat.alternative_count("id"), chat.alternative_index("id")], list[int])
    assert_type([chat.next_alternative("id"), chat.prev_alternative("id")], list[str | None])
    assert_type(ChatHistory[Message].from_json(chat.to_json(), generate_id=lambda: "id"), ChatHistory[Message])
    chat.append("text")  # type: ignore[arg-type]

    tree = chat.tree
    assert_type(tree, MessageTree[Message])
    assert_type([tree.append(message), tree.add_root(message), tree.add_child("id", message)], list[str])
    assert_type([tree.branch("id", message), tree.set_active_leaf("id")], list[str])
    assert_type(tree.get("id"), TreeNode[Message] | None)
    assert_type(tree.path_to("id"), TreePath[Message])
    assert_type(tree.active_path.messages, list[Message])
    assert_type(tree.siblings("id"), tuple[list[TreeNode[Message]], int])
    assert_type(tree.leaves()[0].message, Message)
    assert_type([tree.next_sibling("id"), tree.active_leaf_id], list[str | None])
    assert_type(tree.root_ids, tuple[str, ...])
    assert_type([tree.depth("id"), len(tree)], list[int])
    assert_type(MessageTree[Message].deserialize(tree.serialize()), MessageTree[Message])
    tree.remove("id")
    tree.rewind("id")
    tree.clear()


def conversations(message: Message) -> None:
    with PostgresConversationStore("", table=Identifier("s", "c"), ttl=timedelta(hours=1)) as store:
        assert_type(store, PostgresConversationStore)
        chat: ChatHistory[Message] = store.load("id")
        store.save("id", chat, on_conflict="raise")
        store.save("id", chat, on_conflict="ignore")  # type: ignore[arg-type]
        store.save("id", chat.tree)  # type: ignore[arg-type]
        with store.edit("id", on_conflict="merge") as edited:
            assert_type(edited, ChatHistory[Any])
            edited.append(message)
        assert_type([store.touch("id"), store.delete("id")], list[bool])
        assert_type([store.check()], list[StoreCheck])
        assert_type(store.get_stats(), dict[str, int])
        assert_type(store.list(), Iterator[ConversationInfo])
        assert_type(store.cleanup(), int)
        for info in store.list("owner", limit=10, before=ConversationInfo("id", updated_at=datetime.max)):
            assert_type([info.session_id], list[str])
            assert_type([info.owner, info.title, info.active_stream_id], list[str | None])
            assert_type([info.created_at, info.updated_at, info.expires_at], list[datetime | None])
        store.save("id", chat, owner="owner")
        assert_type(store.describe("id", title="title", metadata={}, owner=None), bool)
        assert_type(store.get_info("id"), ConversationInfo | None)
        assert_type(store.delete_owner("owner", streams=None).conversations, int)
        store.delete_owner("owner")  # type: ignore[call-arg]
    PostgresConversationStore("", ttl=None)
    try:
        store.save("id", chat)
    except ConversationConflictError as conflict:
        assert_type(conflict.session_id, str)
        assert_type([conflict.ours, conflict.theirs], list[Any])
    except (MessageNotFoundError, InvalidHistoryError) as error:
        assert_type(error.node_id, str | None)


async def async_conversations(message: Message) -> None:
    async with AsyncPostgresConversationStore("", table="c", ttl=60) as store:
        chat: ChatHistory[Message] = await store.load("id")
        await store.save("id", chat, on_conflict="overwrite")
        async with store.edit("id") as edited:
            assert_type(edited, ChatHistory[Any])
            edited.append(message)
        assert_type([await store.touch("id"), await store.delete("id")], list[bool])
        assert_type([await store.check()], list[StoreCheck])
        assert_type(store.get_stats(), dict[str, int])
        assert_type(store.list("owner"), AsyncIterator[ConversationInfo])
        assert_type(await store.describe("id", title=None), bool)
        assert_type(await store.get_info("id"), ConversationInfo | None)
        async with AsyncPostgresStreamStore("") as streams:
            assert_type(await store.delete_owner("owner", streams=streams), ErasureResult)
            assert_type(await streams.delete_owner("owner"), int)
        assert_type(await store.cleanup(), int)


@asynccontextmanager
async def async_context() -> AsyncIterator[None]:
    yield


def browsers(store: PostgresStreamStore, conversations: PostgresConversationStore, request: WebRequest) -> None:
    def finish(text: str, status: StreamStatus | None) -> None: ...

    stream = DurableStream.start(store, ["text", StreamEvent("usage", "{}")], id="id", on_finish=finish)
    assert_type(stream, DurableStream)
    assert_type(DurableStream.resume(store, "id", 7), DurableStream)
    assert_type(stream.sse(heartbeat=timedelta(seconds=5)), Iterator[bytes])
    assert_type(stream.wait(5), StreamStatus)
    assert_type([stream.stop(), DurableStream.shutdown(store, timeout=5)], list[bool])
    DurableStream.start(store, ["text"], context=nullcontext)
    DurableStream.start(store, ["text"], context=async_context)  # type: ignore[arg-type]

    def generate(generation: Generation) -> Iterator[str]:
        assert_type([generation.stream_id, generation.session_id, generation.model], list[str | None])
        yield generation.prompt

    handler = StreamHandler(
        generate,
        store=store,
        conversations=conversations,
        authorize=lambda request, resource: resource.owner == "me",
        allowed_origins=["https://example.com"],
    )
    answer = handler.handle(request)
    assert_type(answer, WebResponse)
    assert_type(answer.body, bytes | Iterator[bytes])
    StreamHandler(generate)  # type: ignore[call-arg]


async def async_browsers(store: AsyncPostgresStreamStore, source: AsyncIterator[str], request: WebRequest) -> None:
    stream = await AsyncDurableStream.start(store, source)
    assert_type(stream, AsyncDurableStream)
    assert_type(stream.sse(3), AsyncIterator[bytes])
    assert_type([await stream.stop(), await AsyncDurableStream.shutdown(store)], list[bool])
    await AsyncDurableStream.start(store, source, context=nullcontext)
    await AsyncDurableStream.start(store, source, context=async_context)
    await AsyncDurableStream.start(store, ["text"])  # type: ignore[arg-type]
    answer = await AsyncStreamHandler(lambda generation: source, store=store).handle(request)
    assert_type(answer, AsyncWebResponse)


def django_stores() -> None:
    assert_type(django_app.stream_store(ttl=60), PostgresStreamStore)
    assert_type(django_app.conversation_store("other"), PostgresConversationStore)
    assert_type(django_app.async_stream_store(), AsyncPostgresStreamStore)
    assert_type(django_app.async_conversation_store(ttl=None), AsyncPostgresConversationStore)
