"""Django's connections as clients."""

from __future__ import annotations

import gc
import logging
import threading
import time
import uuid
import weakref

import django
import psycopg
import pytest
from contrib import contract
from django.db import OperationalError, ProgrammingError, connections, transaction
from django.test import override_settings
from django.utils.connection import ConnectionDoesNotExist
from psycopg.sql import SQL, Identifier
from support.concurrency import Background, gather, until, workers
from support.sessions import TERMINATE
from support.tenant_backend.base import Tenant

from aibind_postgres import (
    AibindError,
    AsyncPostgresConversationStore,
    AsyncPostgresStreamStore,
    DurableStream,
    Housekeeper,
    PostgresConversationStore,
    PostgresStreamStore,
    StreamNotFoundError,
    schema,
)
from aibind_postgres._sync import connections as own_connections
from aibind_postgres.adapters import wrap_django

ALIASES = ["default", "server_side", *(["pooled"] if django.VERSION >= (5, 1) else [])]


@pytest.fixture(scope="module", autouse=True)
def databases(django_databases):
    yield
    close_connections()
    if "pooled" in ALIASES:
        connections["pooled"].close_pool()


@pytest.fixture(autouse=True)
def _close_connections_at_the_end():
    yield
    close_connections()


@pytest.fixture
def ours(tables):
    with PostgresStreamStore(wrap_django(), **tables, poll_interval=0.05) as store:
        yield store


def close_connections() -> None:
    """Close the connections of this thread, as Django does at the end of a request."""
    connections.close_all()


@pytest.mark.parametrize("tables", ["plain", "quotes", "formats"], indirect=True)
@pytest.mark.parametrize("alias", ALIASES)
def test_round_trip(tables, alias):
    with PostgresStreamStore(wrap_django(alias), **tables) as store:
        contract.round_trip(store, wrap_django(alias), tables, close_connections)


@pytest.mark.parametrize("conversations", ["plain", "quotes", "formats"], indirect=True)
@pytest.mark.parametrize("alias", ALIASES)
def test_conversation_store(conversations, alias):
    with PostgresConversationStore(wrap_django(alias), table=conversations) as store:
        contract.check_conversations(store, wrap_django(alias))


@pytest.mark.parametrize("store", [AsyncPostgresStreamStore, AsyncPostgresConversationStore])
def test_asynchronous_store_names_the_way_that_works(store):
    with pytest.raises(TypeError, match=r"wrap_django\(\) is for synchronous stores.* Use async_stream_store\(\)"):
        store(wrap_django())


def test_save_after_a_rolled_back_save(conversations):
    with PostgresConversationStore(wrap_django(), table=conversations) as store:
        chat = store.load("s")
        chat.append("undone")
        with pytest.raises(ZeroDivisionError), transaction.atomic():
            store.save("s", chat)
            raise ZeroDivisionError
        assert store.load("s").is_empty
        chat.append("more")
        with transaction.atomic():
            store.save("s", chat)
        assert store.load("s").messages == ["undone", "more"]


@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Asia/Kolkata"])
@pytest.mark.parametrize("alias", ["default", "server_side"])
def test_round_trip_without_time_zones(tables, alias, zone):
    close_connections()
    with (
        override_settings(USE_TZ=False, TIME_ZONE=zone),
        PostgresStreamStore(wrap_django(alias), **tables) as store,
    ):
        contract.round_trip(store, wrap_django(alias), tables, close_connections)
        close_connections()


@pytest.mark.parametrize("alias", ALIASES)
def test_housekeeping(tables, conversations, alias, caplog):
    client = wrap_django(alias)
    with (
        PostgresStreamStore(client, **tables, ttl=0.001) as store,
        PostgresConversationStore(client, table=conversations, ttl=0.001) as chats,
    ):
        contract.check_housekeeping(store, chats, caplog)


def test_housekeeping_works_during_a_transaction_of_the_application(theirs, tables, caplog):
    caplog.set_level(logging.INFO, logger="aibind_postgres")
    id = theirs.create("id")  # not a generated id, whose expired stream partitions by time keep until its day is over
    with PostgresStreamStore(wrap_django(), **tables, ttl=0.001) as store:
        store.complete(id)
        with transaction.atomic():
            store.create("kept")
            with Housekeeper(store):
                until(lambda: caplog.records)
        assert theirs.get_status(id) is None
        assert theirs.get_status("kept").state == "active"
    assert "streams deleted: 1" in caplog.records[0].getMessage()


@pytest.mark.parametrize("alias", ALIASES)
def test_following(theirs, tables, alias):
    with PostgresStreamStore(wrap_django(alias), **tables, poll_interval=0.05) as store:
        contract.check_following(store, theirs, close_connections)


@pytest.mark.parametrize("alias", ALIASES)
def test_notifications_wake_readers(theirs, tables, alias):
    with PostgresStreamStore(wrap_django(alias), **tables, poll_interval=3600) as store:
        contract.check_notification(store, theirs, close_connections)


def test_reader_after_lost_connections(ours, theirs, dsn):
    contract.check_reconnect(ours, theirs, dsn, close_connections)


@pytest.mark.parametrize("alias", ["default", *ALIASES[2:]])
def test_read_only_sessions_are_replaced(tables, alias, dsn):
    if alias == "pooled":
        connections[alias].close_pool()  # Django does not check its connections, which other tests have ended
    with PostgresStreamStore(wrap_django(alias), **tables, poll_interval=0.05) as store:
        contract.check_read_only(store, dsn, close_connections)


def test_one_connection_per_thread(ours):
    id = ours.create()

    def write() -> None:
        try:
            for _ in range(20):
                ours.append(id, "x")
        finally:
            close_connections()

    gather(*[write] * 8)
    assert [chunk.seq for chunk in ours.read_from(id, follow=False)] == list(range(1, 161))


def test_rolled_back_transaction(ours, theirs):
    id = ours.create()
    with pytest.raises(ZeroDivisionError), transaction.atomic():
        assert ours.append(id, "vanishes") == 1
        assert ours.create("inside") == "inside"
        assert ours.get_status(id) == ("active", None, 1)
        assert theirs.get_status(id) == ("active", None, 0)
        raise ZeroDivisionError
    assert theirs.get_status(id) == ("active", None, 0)
    with pytest.raises(StreamNotFoundError):
        ours.stop("inside")
    assert ours.append(id, "stays") == 1


def test_savepoint(ours, theirs):
    id = ours.create()
    with transaction.atomic():
        ours.append(id, "one")
        with pytest.raises(ZeroDivisionError), transaction.atomic():
            ours.append(id, "vanishes")
            raise ZeroDivisionError
        ours.append(id, "two")
        ours.complete(id)
    assert list(theirs.read_from(id)) == [(1, "one"), (2, "two")]


def test_commit_wakes_readers_of_other_stores(ours, dsn, tables):
    id = ours.create()
    with PostgresStreamStore(dsn, **tables, poll_interval=3600) as reading:
        with Background(lambda: [(chunk, time.monotonic()) for chunk in reading.read_from(id)]) as reader:
            time.sleep(1)
            with transaction.atomic():
                ours.append(id, "one")
                ours.complete(id)
                time.sleep(0.2)
                committed = time.monotonic()
            [(chunk, arrived)] = reader.result()
    assert chunk == (1, "one")
    assert committed <= arrived


def test_commit_wakes_readers_of_the_same_store(tables):
    with PostgresStreamStore(wrap_django(), **tables, poll_interval=3600) as store:
        id = store.create()

        def follow():
            try:
                return list(store.read_from(id))
            finally:
                close_connections()

        with Background(follow) as reader:
            time.sleep(1)
            with transaction.atomic():
                store.append(id, "one")
                store.complete(id)
                time.sleep(0.2)
            assert reader.result() == [(1, "one")]


def test_lost_connection_in_a_transaction_raises_without_retries(tables, dsn):
    with PostgresStreamStore(wrap_django(), **tables, retry_for=3600) as store:
        id = store.create()
        with pytest.raises(OperationalError), transaction.atomic():
            store.append(id, "vanishes")
            with psycopg.connect(dsn, autocommit=True) as admin:
                admin.execute(TERMINATE)
            list(store.read_from(id, follow=False))
        assert store.get_status(id) == ("active", None, 0)


def test_refused_notification(ours, theirs, tables, run_sql, caplog):
    id = ours.create()
    role = f"silent_{uuid.uuid4().hex}"
    run_sql(f"CREATE ROLE {role}")
    run_sql("REVOKE EXECUTE ON FUNCTION pg_notify FROM PUBLIC")
    try:
        names = {"schema": Identifier(tables["status_table"]._obj[0]), "role": Identifier(role)}
        for statement in (
            "GRANT USAGE ON SCHEMA {schema} TO {role}",
            "GRANT ALL ON ALL TABLES IN SCHEMA {schema} TO {role}",
        ):
            run_sql(SQL(statement).format(**names).as_string())
        with connections["default"].cursor() as cursor:
            cursor.execute(f"SET ROLE {role}")
        assert ours.append(id, "kept") == 1
        with pytest.raises(ProgrammingError), transaction.atomic():
            ours.append(id, "undone")
        with transaction.atomic():
            with pytest.raises(ProgrammingError), transaction.atomic():
                ours.append(id, "undone")
            assert ours.get_status(id) == ("active", None, 1)
        assert theirs.get_status(id) == ("active", None, 1)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
    finally:
        close_connections()
        run_sql("GRANT EXECUTE ON FUNCTION pg_notify TO PUBLIC")
        run_sql(f"DROP OWNED BY {role}")
        run_sql(f"DROP ROLE {role}")


@pytest.mark.parametrize("listens", [True, False])
def test_background_threads_close_djangos_connections(theirs, tables, monkeypatch, listens):
    opened = weakref.WeakSet()
    connect = type(connections["default"]).connect

    def connect_and_record(wrapper):
        connect(wrapper)
        opened.add(wrapper.connection)

    def refuse(*_):
        raise psycopg.OperationalError("too many connections")

    monkeypatch.setattr(type(connections["default"]), "connect", connect_and_record)
    if not listens:
        monkeypatch.setattr(own_connections, "open_connection", refuse)
    with PostgresStreamStore(wrap_django(), **tables, poll_interval=0.05) as store, Housekeeper(store):
        contract.check_following(store, theirs, close_connections)
        assert "aibind_postgres-listener" in workers()
    close_connections()
    gc.collect()
    assert not [connection for connection in opened if not connection.closed]


def test_assumed_role(dsn, ours, theirs, monkeypatch):
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute('CREATE ROLE "a role" SUPERUSER')
    try:
        options = connections["default"].settings_dict["OPTIONS"]
        monkeypatch.setitem(options, "assume_role", "a role")
        with wrap_django().connect() as connection:
            assert connection.execute("SELECT current_user").fetchone() == ("a role",)
    finally:
        with psycopg.connect(dsn, autocommit=True) as admin:
            admin.execute('DROP ROLE "a role"')


def test_producer_that_does_not_see_its_stream_ends_its_readers(ours, theirs):
    finished = []
    with transaction.atomic():  # as around each test of Django's TestCase
        stream = DurableStream.start(ours, iter(["text"]), on_finish=lambda *call: finished.append(call))
        for read in (lambda: list(stream.sse()), stream.wait, lambda: list(stream.sse(after_seq=1))):
            with pytest.raises(AibindError, match=r"transaction\.on_commit"):
                read()
        until(lambda: finished)
    assert finished == [("", None)]
    assert theirs.stop(stream.id) is True


def test_producer_writes_into_the_schema_of_its_tenant(run_sql):
    schemas = [f"tenant_{uuid.uuid4().hex[:8]}" for _ in range(2)]
    finished = []
    for name in schemas:
        run_sql(f"CREATE SCHEMA {name}")
        run_sql(f"SET search_path = {name}; {schema.render()}; RESET search_path")

    def source():
        with connections["tenants"].cursor() as cursor:
            cursor.execute("SELECT current_schema()")
            yield cursor.fetchone()[0]

    def finish(text, status):
        finished.append((text, status.state, store.get_status("same").total_chunks))

    try:
        with PostgresStreamStore(wrap_django("tenants"), poll_interval=0.05) as store:
            streams = {}
            for name in schemas:
                connections["tenants"].set_tenant(Tenant(name))
                streams[name] = DurableStream.start(store, source(), id="same", on_finish=finish)
            for name, stream in streams.items():
                connections["tenants"].set_tenant(Tenant(name))
                assert stream.wait(30) == ("done", None, 1)
                assert list(store.read_from("same")) == [(1, f"\x01{name}")]
        assert sorted(finished) == sorted((name, "done", 1) for name in schemas)
    finally:
        close_connections()
        for name in schemas:
            run_sql(f"DROP SCHEMA {name} CASCADE")


def test_writers_of_one_tenant_share_renewals(run_sql):
    class RequestTenant:
        """A tenant as django-tenants makes it for each request: equal only to itself."""

        def __init__(self, schema_name):
            self.schema_name = schema_name

    def wait_for_gate():
        gate.wait()
        yield "a"

    gate = threading.Event()
    schemas = [f"tenant_{uuid.uuid4().hex[:8]}" for _ in range(2)]
    try:
        with PostgresStreamStore(wrap_django("tenants"), lease=0.6) as store:
            for name in schemas:
                run_sql(f"CREATE SCHEMA {name}")
                run_sql(f"SET search_path = {name}; {schema.render()}; RESET search_path")
                for id in ("one", "two"):
                    connections["tenants"].set_tenant(RequestTenant(name))
                    DurableStream.start(store, wait_for_gate(), id=id)
            until(lambda: sum(map(len, list(store._leases._held.values()))) == 4)
            assert [sorted(ids) for ids in store._leases._held.values()] == [["one", "two"]] * 2
            for name in schemas:
                connections["tenants"].set_tenant(Tenant(name))
                given = {info.id: info.lease_until for info in store.list()}
                until(lambda given=given: all(info.lease_until > given[info.id] for info in store.list()))
            gate.set()
            assert DurableStream.shutdown(store, 20)
    finally:
        gate.set()
        close_connections()
        for name in schemas:
            run_sql(f"DROP SCHEMA {name} CASCADE")


def test_missing_table():
    contract.missing_tables(wrap_django())


@pytest.mark.parametrize("alias", ["default", "server_side"])
@pytest.mark.parametrize("name", contract.NAMES)
def test_hostile_names(schema_name, alias, name):
    contract.hostile_names(wrap_django(alias), contract.hostile(schema_name, name), close_connections)


def test_django_errors_propagate(tables):
    with PostgresStreamStore(wrap_django("unreachable"), **tables, retry_for=0.2) as store:
        for call in (store.create, lambda: list(store.read_from("x"))):
            with pytest.raises(OperationalError) as caught:
                call()
            assert isinstance(caught.value.__cause__, psycopg.OperationalError)


def test_invalid_database():
    with pytest.raises(ConnectionDoesNotExist):
        wrap_django("unknown")
    with pytest.raises(TypeError, match="sqlite"):
        wrap_django("lite")
