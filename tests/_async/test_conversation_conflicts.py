"""Concurrent writers of one conversation: no message is lost, even if requests or replies are."""

from __future__ import annotations

import copy
import json
import pickle
from functools import partial

import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool
from support.citus import activity
from support.concurrency import AsyncBackground, async_gather, async_sleep

from aibind_postgres import AsyncPostgresConversationStore, ChatHistory, ConversationConflictError, InvalidHistoryError


class CountingClient:
    """A client on a pool that counts statements, and can lose requests and replies."""

    def __init__(self, pool):
        self.pool = pool
        self.statements = 0
        self.lose = []  # for the next statements: None, "request" or "reply"
        self.before_next = []  # functions to call before the next statements

    async def query(self, sql, params):
        self.statements += 1
        if self.before_next:
            await self.before_next.pop(0)()
        lose = self.lose.pop(0) if self.lose else None
        if lose == "request":
            raise psycopg.OperationalError("request lost")
        async with self.pool.connection() as connection:
            cursor = psycopg.AsyncRawCursor(connection)
            await cursor.execute(sql, params)
            rows = await cursor.fetchall() if cursor.description else []
        if lose == "reply":
            raise psycopg.OperationalError("reply lost")
        return rows


class TypeScriptWriter:
    """Writes like the TypeScript package, which does not check for conflicts."""

    def __init__(self, connection, table):
        self.connection = connection
        self.table = table.as_string(None)

    async def load(self, session_id):
        sql = f"SELECT data FROM {self.table} WHERE session_id = $1 AND expires_at > 0"
        row = await (await self.connection.execute(sql, [session_id])).fetchone()
        return ChatHistory() if row is None else ChatHistory.from_json(row[0])

    async def save(self, session_id, chat):
        sql = (
            f"INSERT INTO {self.table} (session_id, data, expires_at) VALUES ($1, $2, 9e15)"
            "ON CONFLICT (session_id) DO UPDATE SET data = EXCLUDED.data, expires_at = EXCLUDED.expires_at"
        )
        await self.connection.execute(sql, [session_id, chat.to_json()])


@pytest.fixture
async def client(dsn):
    async with AsyncConnectionPool(dsn, kwargs={"autocommit": True}, min_size=1, max_size=10, open=False) as pool:
        yield CountingClient(pool)


@pytest.fixture
async def store(client, conversations):
    async with AsyncPostgresConversationStore(client, table=conversations) as store:
        yield store


@pytest.fixture
async def connection(dsn):
    opening = psycopg.AsyncConnection.connect(dsn, autocommit=True, cursor_factory=psycopg.AsyncRawCursor)
    async with await opening as connection:
        yield connection


@pytest.fixture
def typescript(connection, conversations):
    return TypeScriptWriter(connection, conversations)


async def load_twice(store):
    """Create a conversation of one message, and load it twice."""
    async with store.edit("s") as chat:
        chat.append("first")
    return await store.load("s"), await store.load("s")


def messages(chat):
    """Return all messages in all branches, in order."""
    return sorted(node["message"] for node in chat.tree.serialize()["nodes"].values())


@pytest.mark.parametrize("initial", ["empty", "with a message", "expired"])
@pytest.mark.parametrize("shared", [True, False])
async def test_sixteen_concurrent_edits_lose_nothing(store, dsn, conversations, connection, initial, shared):
    if initial != "empty":
        async with store.edit("s") as chat:
            chat.append("first")
    if initial == "expired":
        await connection.execute(f"UPDATE {conversations.as_string(None)} SET expires_at = 0")

    async def work(name):
        async def turns(store):
            for number in range(5):
                async with store.edit("s") as chat:
                    chat.append(f"{name} {number}")

        if shared:
            await turns(store)
        else:
            async with AsyncPostgresConversationStore(dsn, table=conversations) as own:
                await turns(own)

    await async_gather(*(partial(work, f"worker {number:02}") for number in range(16)))
    chat = await store.load("s")
    expected = [f"worker {worker:02} {number}" for worker in range(16) for number in range(5)]
    assert messages(chat) == (["first"] if initial == "with a message" else []) + expected
    assert ChatHistory.from_json(chat.to_json()).to_json() == chat.to_json()


async def test_sixteen_concurrent_saves_of_kept_histories_lose_nothing(store):
    async def work(name):
        chat = await store.load("s")
        for number in range(5):
            chat.append(f"{name} {number}")
            await store.save("s", chat)

    await async_gather(*(partial(work, f"worker {number:02}") for number in range(16)))
    expected = [f"worker {worker:02} {number}" for worker in range(16) for number in range(5)]
    assert messages(await store.load("s")) == expected


async def test_history_equals_the_row_after_a_save(store):
    one, two = await load_twice(store)
    one.append("one")
    two.append("two")
    await store.save("s", one)
    await store.save("s", two)
    stored = await store.load("s")
    assert two.to_json() == stored.to_json()
    assert two.messages == ["first", "two"]
    assert messages(two) == ["first", "one", "two"]
    assert {node.message for node in two.tree.siblings(two.node_ids[-1])[0]} == {"one", "two"}
    assert messages(one) == ["first", "one"]
    one.append("more")
    await store.save("s", one)
    assert one.messages == ["first", "one", "more"]
    assert messages(one) == ["first", "more", "one", "two"]


async def test_save_is_one_statement_without_a_merge(store, client):
    one, two = await load_twice(store)
    client.statements = 0
    for number in range(3):
        one.append(f"{number}")
        await store.save("s", one)
    assert client.statements == 3
    two.append("two")
    await store.save("s", two)
    assert client.statements == 5
    two.append("more")
    await store.save("s", two)
    assert client.statements == 6
    for call in (store.load, store.touch, store.delete):
        await call("s")
    assert client.statements == 9


async def test_conflict_error_holds_both_histories_and_changes_nothing(store):
    one, two = await load_twice(store)
    one.append("one")
    await store.save("s", one)
    two.append("two")
    before = two.to_json()
    for _ in range(2):
        with pytest.raises(ConversationConflictError, match="'s' was changed") as caught:
            await store.save("s", two, on_conflict="raise")
        conflict = caught.value
        assert (conflict.session_id, conflict.ours) == ("s", two)
        assert conflict.theirs.messages == ["first", "one"]
        assert two.to_json() == before
        assert (await store.load("s")).to_json() == one.to_json()
    # Both histories of the error can be changed and saved.
    conflict.theirs.append("three")
    await store.save("s", conflict.theirs, on_conflict="raise")
    await store.save("s", two)
    assert messages(two) == ["first", "one", "three", "two"]


async def test_raise_without_a_conflict(store):
    chat = ChatHistory()
    for number in range(3):
        chat.append(f"{number}")
        await store.save("s", chat, on_conflict="raise")
    assert (await store.load("s")).messages == ["0", "1", "2"]


async def test_overwrite_ignores_conflicts(store):
    one, two = await load_twice(store)
    one.append("one")
    await store.save("s", one)
    two.append("two")
    await store.save("s", two, on_conflict="overwrite")
    assert (await store.load("s")).to_json() == two.to_json()
    assert messages(two) == ["first", "two"]
    two.append("three")
    await store.save("s", two, on_conflict="raise")


async def test_new_history_only_adds(store):
    async with store.edit("s") as chat:
        chat.append("stored")
    made = ChatHistory()
    made.append("made")
    await store.save("s", made)
    assert messages(await store.load("s")) == messages(made) == ["made", "stored"]
    assert made.messages == ["made"]
    again = ChatHistory.from_json(made.to_json())
    again.compact("summary")
    with pytest.raises(ConversationConflictError):
        await store.save("s", again, on_conflict="raise")


async def test_copies_keep_the_merge_base(store):
    one, two = await load_twice(store)
    two.append("two")
    await store.save("s", two)
    for draft in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        draft.compact("summary")
        await store.save("s", draft)
    assert messages(draft) == ["summary", "summary", "two"]


async def test_merge_with_typescript_writer(store, typescript):
    ours, _ = await load_twice(store)
    ours.append("ours")
    theirs = await typescript.load("s")
    theirs.append("theirs")
    theirs.edit(theirs.node_ids[0], "edited")
    await typescript.save("s", theirs)
    await store.save("s", ours)
    assert messages(await store.load("s")) == ["edited", "first", "ours", "theirs"]
    assert ours.messages == ["first", "ours"]


async def test_merge_with_concurrent_compact(store, typescript):
    ours, _ = await load_twice(store)
    ours.append("question")
    ours.append("answer")
    theirs = await typescript.load("s")
    theirs.compact("summary")
    await typescript.save("s", theirs)
    await store.save("s", ours)
    assert ours.messages == (await typescript.load("s")).messages == ["summary", "question", "answer"]


async def test_merge_with_concurrently_created_row(store, client, typescript):
    ours = await store.load("s")
    ours.append("ours")
    theirs = await typescript.load("s")
    theirs.append("theirs")
    client.before_next = [partial(typescript.save, "s", theirs)]
    await store.save("s", ours)
    assert messages(await typescript.load("s")) == messages(ours) == ["ours", "theirs"]


async def test_repeatedly_overtaken_save_succeeds(store, client, typescript):
    ours, _ = await load_twice(store)
    ours.append("ours")

    async def overtake(number):
        theirs = await typescript.load("s")
        theirs.append(f"theirs {number}")
        await typescript.save("s", theirs)

    client.before_next = [partial(overtake, number) for number in range(5)]
    await store.save("s", ours)
    assert messages(ours) == ["first", "ours", *(f"theirs {number}" for number in range(5))]


@pytest.mark.parametrize("lost", [["request"], ["reply"], ["reply", "request", "reply"]])
@pytest.mark.parametrize("on_conflict", ["merge", "raise", "overwrite"])
@pytest.mark.parametrize("is_new", [True, False])
async def test_save_with_unknown_outcome_can_be_repeated(store, client, lost, on_conflict, is_new):
    chat = ChatHistory() if is_new else (await load_twice(store))[0]
    chat.append("mine")
    client.lose = list(lost)
    for _ in lost:
        with pytest.raises(psycopg.OperationalError):
            await store.save("s", chat, on_conflict=on_conflict)
        chat.append("more")
    await store.save("s", chat, on_conflict=on_conflict)
    assert (await store.load("s")).to_json() == chat.to_json()
    assert chat.messages == ([] if is_new else ["first"]) + ["mine"] + ["more"] * len(lost)
    chat.append("and on")
    await store.save("s", chat, on_conflict="raise")


async def test_merge_with_lost_reply_can_be_repeated(store, client):
    one, two = await load_twice(store)
    one.append("one")
    await store.save("s", one)
    two.append("two")
    client.lose = [None, "reply"]
    with pytest.raises(psycopg.OperationalError):
        await store.save("s", two)
    two.append("three")
    await store.save("s", two)
    assert messages(await store.load("s")) == messages(two) == ["first", "one", "three", "two"]
    assert two.messages == ["first", "two", "three"]


async def test_repeated_merge_stays_below_the_summary(store, client):
    for number in range(10):  # the random ids must not decide the result
        session_id = f"{number}"
        async with store.edit(session_id) as chat:
            chat.append("old")
        ours = await store.load(session_id)
        ours.append("question")
        async with store.edit(session_id) as theirs:
            theirs.compact("summary")
        client.lose = [None, "reply"]
        with pytest.raises(psycopg.OperationalError):
            await store.save(session_id, ours)
        ours.append("answer")
        await store.save(session_id, ours)
        assert ours.messages == (await store.load(session_id)).messages == ["summary", "question", "answer"]


async def test_duplicate_ids_raise_and_lose_nothing(store):
    ids = ["m1", "m1", "m0"]
    one = ChatHistory(generate_id=lambda: ids.pop())
    one.append("first")
    await store.save("s", one)
    two = copy.deepcopy(one)
    one.append("one")
    two.append("two")
    await store.save("s", one)
    with pytest.raises(InvalidHistoryError, match=r"'m1'.*unique"):
        await store.save("s", two)
    assert (await store.load("s")).messages == ["first", "one"]
    assert two.messages == ["first", "two"]


@pytest.fixture(params=["pool", "connection"])
async def any_store(request, store, connection, conversations):
    """A store on a pool, then on a connection, outside transactions."""
    if request.param == "pool":
        return store
    return AsyncPostgresConversationStore(connection, table=conversations)


@pytest.mark.parametrize("on_conflict", ["merge", "raise"])
@pytest.mark.parametrize("removal", ["deleted", "expired", "compacted"])
async def test_removal_by_another_writer_is_detected_on_every_client(
    any_store, store, connection, conversations, removal, on_conflict
):
    chat = await any_store.load("s")
    chat.append("question")
    await any_store.save("s", chat)
    chat.append("answer")
    await any_store.save("s", chat)
    assert len(chat._origin.digests) == 1
    if removal == "deleted":
        await store.delete("s")
    elif removal == "expired":
        await connection.execute(f"UPDATE {conversations.as_string(None)} SET expires_at = 0")
    else:
        async with store.edit("s") as other:
            other.compact("summary")
    chat.append("more")
    if on_conflict == "raise":
        with pytest.raises(ConversationConflictError):
            await any_store.save("s", chat, on_conflict="raise")
    await any_store.save("s", chat)
    assert (
        chat.messages == (await store.load("s")).messages == (["summary"] if removal == "compacted" else []) + ["more"]
    )


async def test_rolled_back_save_is_not_lost(dsn, conversations, connection):
    store = AsyncPostgresConversationStore(connection, table=conversations)
    one, two = await load_twice(store)
    for chat in (ChatHistory(), one):
        session_id = "s" if chat is one else "new"
        chat.append("rolled back")
        with pytest.raises(ZeroDivisionError):
            async with connection.transaction():
                await store.save(session_id, chat)
                assert (await store.load(session_id)).messages == chat.messages
                raise ZeroDivisionError
        chat.append("more")
        await store.save(session_id, chat)
        assert (await store.load(session_id)).messages == chat.messages
        assert chat.messages[-2:] == ["rolled back", "more"]
        chat.append("and on")
        await store.save(session_id, chat, on_conflict="raise")
    two.append("two")
    await store.save("s", two)
    assert messages(await store.load("s")) == ["and on", "first", "more", "rolled back", "two"]


async def test_rolled_back_save_is_not_lost_in_a_merge(dsn, conversations, connection):
    store = AsyncPostgresConversationStore(connection, table=conversations)
    one, two = await load_twice(store)
    one.append("rolled back")
    with pytest.raises(ZeroDivisionError):
        async with connection.transaction():
            await store.save("s", one)
            raise ZeroDivisionError
    two.append("two")
    await store.save("s", two)
    with pytest.raises(ConversationConflictError):
        await store.save("s", one, on_conflict="raise")
    await store.save("s", one)
    assert messages(await store.load("s")) == messages(one) == ["first", "rolled back", "two"]


@pytest.mark.parametrize("change", ["replace", "delete", "create", "expire", "touch"])
async def test_save_sees_the_changes_of_a_transaction_it_waits_for(
    store, dsn, conversations, schema_name, connection, change, on_citus
):
    """The other transaction has changed the row, and commits once the statement of the save waits for it."""
    table = conversations.as_string(None)
    other = ChatHistory()
    other.append("other")
    if change == "create":
        chat = await store.load("s")
        sql = f"INSERT INTO {table} VALUES ('s', $1, 9e15)"
    else:
        chat, _ = await load_twice(store)
        sql = {
            "replace": f"UPDATE {table} SET data = $1",
            "delete": f"DELETE FROM {table} WHERE $1::text <> ''",
            "expire": f"UPDATE {table} SET expires_at = 0 WHERE $1::text <> ''",
            "touch": f"UPDATE {table} SET expires_at = 9e15 WHERE $1::text <> ''",
        }[change]
    chat.append("mine")
    opening = psycopg.AsyncConnection.connect(dsn, cursor_factory=psycopg.AsyncRawCursor)
    async with await opening as holder:
        await holder.execute(sql, [other.to_json()])
        async with AsyncBackground(partial(store.save, "s", chat)) as saving:
            waiting = (
                f"SELECT count(*) FROM {activity(on_citus)} WHERE wait_event_type = 'Lock' AND strpos(query, $1) > 0 "
                "AND datname = current_database()"
            )
            while (await (await connection.execute(waiting, [schema_name])).fetchone())[0] == 0:
                await async_sleep(0.01)
            await holder.commit()
            await saving.result()
    expected = {"replace": ["mine", "other"], "create": ["mine", "other"], "touch": ["first", "mine"]}
    assert messages(await store.load("s")) == messages(chat) == expected.get(change, ["mine"])


async def test_differently_formatted_row_is_no_conflict(store, connection, conversations):
    chat = ChatHistory()
    chat.append("é")
    text = json.dumps(json.loads(chat.to_json()), indent=2)
    await connection.execute(f"INSERT INTO {conversations.as_string(None)} VALUES ('s', $1, 9e15)", [text])
    async with store.edit("s", on_conflict="raise"):
        pass
    async with store.edit("s", on_conflict="raise") as chat:
        chat.append("x")
    assert (await store.load("s")).messages == ["é", "x"]
