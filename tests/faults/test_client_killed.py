"""Killed producers: acknowledged chunks are stored, readers see the end, and a successor is the only writer."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from support.programs import BATCH, TIMEOUT, program, text_of

from aibind_postgres import PostgresStreamStore, SequenceConflictError, StreamNotActiveError

SEED = 5
ABANDONED = ["error", "abandoned: no chunk for 0 seconds"]

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.parametrize("flavour", ["_async", "_sync"]),
    pytest.mark.parametrize("how", ["append", "append_many", "write"]),
]


@pytest.fixture
def programs(flavour):
    return Path(__file__).parent / flavour / "programs.py"


@pytest.fixture
def producer_dsn(database):
    return make_conninfo(database, application_name="producer")


@pytest.fixture
def store(database):
    with PostgresStreamStore(database) as store:
        yield store


@pytest.fixture
def rng():
    print(f"the seed is {SEED}")
    return random.Random(SEED)


def wait_for_server(database):
    """Wait until the server has run the last statements of a killed producer and closed its connections."""
    statement = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'producer'"
    deadline = time.monotonic() + TIMEOUT
    with psycopg.connect(database, autocommit=True) as connection:
        while connection.execute(statement).fetchone() != (0,):
            assert time.monotonic() < deadline, "the server still has a connection of the killed producer"
            time.sleep(0.01)


def stored_chunks(database, id):
    with psycopg.connect(database) as connection:
        statement = "SELECT seq, data FROM aibind_stream_chunks WHERE id = %s ORDER BY seq"
        return connection.execute(statement, [id]).fetchall()


def remove_lease(database, id):
    with psycopg.connect(database) as connection:
        connection.execute("UPDATE aibind_stream_status SET lease_until = NULL WHERE id = %s", [id])


def numbered(texts):
    return list(enumerate(texts, 1))


def test_acknowledged_chunks_of_a_killed_producer_are_stored(
    database, producer_dsn, store, programs, how, tmp_path, rng, long
):
    for number in range(20 if long else 1):
        id = f"stream {number}"
        store.create(id)
        with program(tmp_path, programs, "read", database, id) as reader:
            with program(tmp_path, programs, how, producer_dsn, id, "first") as producer:
                producer.wait_for(1)
                time.sleep(rng.uniform(0, 0.3))
                acknowledged = producer.kill()
            wait_for_server(database)
            chunks = stored_chunks(database, id)
            print(f"{id}: {acknowledged[-1]} chunks acknowledged, {len(chunks)} stored")
            assert chunks == numbered(text_of("first", seq) for seq in range(1, len(chunks) + 1))
            step = 1 if how == "append" else BATCH
            assert acknowledged == list(range(step, acknowledged[-1] + 1, step))
            assert len(chunks) >= acknowledged[-1]
            # A batch is stored whole or not at all. The size of a writer's batch varies.
            assert how != "append_many" or len(chunks) % BATCH == 0
            assert store.get_status(id) == ("active", None, len(chunks))

            reader.wait_for(len(chunks))
            assert store.fail_abandoned(600) == []
            time.sleep(0.2)
            assert reader.process.poll() is None, "the reader ended before its stream"
            remove_lease(database, id)  # which a reader would wait for; tests/faults/_async/test_leases.py does
            assert store.fail_abandoned(0) == [id]
            *seen, status = reader.end()
            assert reader.process.returncode == 0
        assert seen == [list(chunk) for chunk in chunks]
        assert status == [*ABANDONED, len(chunks)]
        assert [tuple(chunk) for chunk in store.read_from(id)] == chunks

        assert not store.acquire(id)
        with pytest.raises(StreamNotActiveError):
            store.append(id, "too late", expected_seq=len(chunks) + 1)
        assert store.acquire(f"{id}, again")
        store.append_many(f"{id}, again", [text for _, text in chunks], expected_seq=1)
        store.complete(f"{id}, again")
        assert [tuple(chunk) for chunk in store.read_from(f"{id}, again")] == chunks


def test_restarts_of_a_killed_producer_leave_no_gap(database, producer_dsn, store, programs, how, tmp_path, rng, long):
    last = 0
    with program(tmp_path, programs, "read", database, store.create("one")) as reader:
        for _ in range(20 if long else 2):
            with program(tmp_path, programs, how, producer_dsn, "one", "same") as producer:
                producer.wait_for(1)
                time.sleep(rng.uniform(0, 0.2))
                acknowledged = producer.kill()
            assert acknowledged[0] > last
            last = acknowledged[-1]
            wait_for_server(database)
        store.complete("one")
        *seen, status = reader.end()
    chunks = stored_chunks(database, "one")
    assert len(chunks) >= last
    assert chunks == numbered(text_of("same", seq) for seq in range(1, len(chunks) + 1))
    assert seen == [list(chunk) for chunk in chunks]
    assert status == ["done", None, len(chunks)]


def test_overtaken_producer_gets_a_conflict(database, producer_dsn, store, programs, how, tmp_path, rng, long):
    for number in range(10 if long else 1):
        id = f"stream {number}"
        with program(tmp_path, programs, how, producer_dsn, id, "first") as producer:
            producer.wait_for(1)
            time.sleep(rng.uniform(0, 0.1))
            producer.process.send_signal(signal.SIGSTOP)
            assert not store.acquire(id)
            with pytest.raises(SequenceConflictError) as conflict:
                store.append(id, text_of("second", 1), expected_seq=1)
            assert conflict.value.actual > 1
            while True:
                before = store.get_status(id).total_chunks
                successor_texts = [text_of("second", before + offset) for offset in range(1, 4)]
                try:
                    store.append_many(id, successor_texts, expected_seq=before + 1)
                    break
                except SequenceConflictError:  # a statement that the first producer sent earlier took effect meanwhile
                    continue
            producer.process.send_signal(signal.SIGCONT)
            *acknowledged, error = producer.end()
        assert error == "SequenceConflictError"
        assert acknowledged[-1] <= before
        assert store.append(id, "the end", expected_seq=before + 4) == before + 4
        assert store.get_status(id) == ("active", None, before + 4)
        expected = [*(text_of("first", seq) for seq in range(1, before + 1)), *successor_texts, "the end"]
        assert stored_chunks(database, id) == numbered(expected)
