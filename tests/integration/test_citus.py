"""Distributed tables, if `AIBIND_TEST_DSN` leads to the coordinator of a Citus cluster."""

from __future__ import annotations

import time
from functools import partial

import psycopg
import pytest
from psycopg.sql import Identifier
from support.concurrency import gather

from aibind_postgres import ChatHistory, PostgresConversationStore, PostgresStreamStore, schema
from aibind_postgres._sql import StreamStatements
from aibind_postgres._tables import CHUNKS_TABLE, STATUS_TABLE, Table

NAMES = {
    "default": {},
    "hostile": {
        "chunks_table": Identifier("my", 'a"b\n;DROP TABLE x; --'),
        "status_table": Identifier("my", "$migrate$ $append$ it's \\"),
        "conversations_table": Identifier("my", "aibind_stream_chunks.aibind_stream_status"),
    },
}


@pytest.fixture(autouse=True)
def cluster(on_citus):
    if not on_citus:
        pytest.skip("the server has no Citus")


@pytest.fixture
def admin(empty_database):
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA my")
        yield connection


def distributed(admin):
    """Return the distribution column of each table by its name, and the number of co-location groups."""
    rows = admin.execute(
        "SELECT relname, distribution_column, t.colocation_id FROM citus_tables AS t, pg_class AS c "
        "WHERE c.oid = table_name"
    ).fetchall()
    return {name: column for name, column, _ in rows}, len({group for _, _, group in rows})


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_tables_are_distributed_once(admin, empty_database, names):
    admin.execute(schema.render(**names, citus=True).encode())
    for _ in range(2):
        schema.migrate(empty_database, **names, citus=True)
    columns, groups = distributed(admin)
    assert sorted(columns.values()) == ["id", "id", "id", "session_id"]
    assert groups == 1
    with PostgresStreamStore(
        empty_database, **{key: names[key] for key in names if key != "conversations_table"}
    ) as store:
        id = store.create()
        assert [store.append(id, "a"), store.append_many(id, ["b", "c"])] == [1, 3]
        assert store._schema.has_append
        assert [chunk.data for chunk in store.read_from(id, follow=False)] == ["a", "b", "c"]


def test_rows_are_kept(admin, empty_database):
    schema.migrate(empty_database)
    with PostgresStreamStore(empty_database) as streams, PostgresConversationStore(empty_database) as conversations:
        ids = [streams.create() for _ in range(20)]
        for id in ids:
            streams.append_many(id, ["a", "b"])
            streams.complete(id)
            chat = ChatHistory()
            chat.append(id)
            conversations.save(id, chat)
        streams.archive(0)
        for id in ids[10:]:
            streams.unarchive(id)
        schema.migrate(empty_database, citus=True)
        assert distributed(admin) == (
            {
                STATUS_TABLE: "id",
                CHUNKS_TABLE: "id",
                "aibind_stream_chunks_archive": "id",
                "aibind_conversations": "session_id",
            },
            1,
        )
        # These stores have looked up the tables before. They find out by the refusal of the server.
        assert {info.session_id for info in conversations.list()} == set(ids)
        assert [[chunk.data for chunk in streams.read_from(id)] for id in ids] == [["a", "b"]] * 20
        admin.execute("UPDATE aibind_stream_status SET expires_at = 1")
        assert streams.cleanup() == (20, 20)  # chunks of the archive are not counted
    assert admin.execute("SELECT count(*) FROM aibind_stream_chunks_archive").fetchone() == (0,)


def test_append_runs_on_the_worker(database):
    statements = StreamStatements(Table(None, CHUNKS_TABLE), Table(None, STATUS_TABLE), lease=15_000)
    notices = []
    with psycopg.connect(database, autocommit=True, cursor_factory=psycopg.RawCursor) as connection:
        connection.execute(statements.create, ["a", 1000, 10])
        connection.execute("SET client_min_messages = debug1")
        connection.add_notice_handler(lambda notice: notices.append(notice.message_primary))
        for number in range(10):
            result = connection.execute(statements.append_distributed, ["a", '["x"]', None, 1000])
            assert result.fetchall() == [(number + 1,)]
    assert notices.count("pushing down the function call") == 10


def test_concurrent_appends_leave_no_gap(database):
    """Eighteen writers with two stores append to eight streams: 1,440 appends."""
    with PostgresStreamStore(database) as first, PostgresStreamStore(database) as second:
        ids = [first.create() for _ in range(8)]

        def write(writer):
            store = (first, second)[writer % 2]
            return [(id, store.append(id, f"{writer} {number}")) for number in range(10) for id in ids]

        results = gather(*(partial(write, writer) for writer in range(18)))
        assert sorted(pair for result in results for pair in result) == sorted(
            (id, number) for id in ids for number in range(1, 181)
        )
        for id in ids:
            chunks = list(second.read_from(id, follow=False))
            assert [chunk.seq for chunk in chunks] == list(range(1, 181))
            assert len({chunk.data for chunk in chunks}) == 180


def test_updates_on_the_workers_are_heap_only(database):
    with PostgresStreamStore(database) as store:
        ids = [store.create() for _ in range(4)]
        for number in range(150):
            for id in ids:
                assert store.append(id, "x") == number + 1
    statement = (
        "SELECT sum(split_part(result, ' ', 1)::integer), sum(split_part(result, ' ', 2)::integer) "
        "FROM run_command_on_shards('aibind_stream_status', "
        "$$SELECT n_tup_upd || ' ' || n_tup_hot_upd FROM pg_stat_user_tables WHERE relid = '%s'::regclass$$)"
    )
    with psycopg.connect(database, autocommit=True) as connection:
        updates = 0
        while updates < 600:  # the sessions on the workers report their statistics with a delay
            [(updates, hot)] = connection.execute(statement)
            time.sleep(0.1)
    assert updates == 600
    assert hot >= 0.95 * updates


def test_stores_in_a_transaction_of_the_caller(database):
    with psycopg.connect(database) as connection:
        streams, conversations = PostgresStreamStore(connection), PostgresConversationStore(connection)
        with connection.transaction():
            id = streams.create(session_id="s")
            assert [streams.append(id, "a"), streams.append(id, "b")] == [1, 2]
            chat = ChatHistory()
            chat.append("question")
            conversations.save("s", chat)
        with connection.transaction():
            assert [info.active_stream_id for info in conversations.list()] == [id]
            assert [info.id for info in streams.list()] == [id]
            assert (streams.cleanup(), conversations.cleanup()) == ((0, 0), 0)
            assert streams.fail_abandoned(0) == [id]
        assert [chunk.data for chunk in streams.read_from(id, follow=False)] == ["a", "b"]
