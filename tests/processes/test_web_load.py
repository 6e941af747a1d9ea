"""The web frameworks under load: many readers, slow readers, and readers that disconnect."""

from __future__ import annotations

import asyncio
import resource
import socket
import struct
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest
from support.concurrency import until
from support.recording import POLL

from aibind_postgres import PostgresStreamStore
from aibind_postgres.sse import EventParser, ServerSentEvent

if TYPE_CHECKING:
    from support.webapps import Client

READERS = 1000
PROC = Path("/proc/self/status").exists()
DONE = ServerSentEvent("", "done")

# The maximum number of database connections of two processes: each has a pool of ten and a listener.
CONNECTIONS = 2 * (10 + 1)


@pytest.fixture(scope="module", autouse=True)
def file_limit():
    """Raise the limit of open files of this process and its servers to twice the number of readers."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < 2 * READERS:
        resource.setrlimit(resource.RLIMIT_NOFILE, (2 * READERS, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def resume_request(id: str) -> bytes:
    # HTTP/1.0 has no chunked encoding, so the body is the plain event stream.
    return f"GET /__aibind__/stream/resume?id={id} HTTP/1.0\r\n\r\n".encode()


def count_connections(dsn: str, condition: str = "true") -> int:
    """Count a server's connections to its database for which a condition holds."""
    # Exclude the test's connections by name, since pg_stat_activity may list one that was just closed.
    with psycopg.connect(dsn, autocommit=True, application_name="test") as connection:
        row = connection.execute(
            "SELECT count(*) FROM pg_stat_activity"
            f" WHERE datname = current_database() AND application_name <> 'test' AND {condition}"
        ).fetchone()
    return row[0]


@pytest.mark.parametrize("client", ["starlette"], indirect=True)
@pytest.mark.parametrize("streams", [1, 20])
async def test_thousand_readers_share_few_connections(client, store, web_database, streams):
    ids = [store.create() for _ in range(streams)]
    chunks = [f"{number}" for number in range(1, 51)]

    async def read(id: str, arrived: asyncio.Event) -> list[ServerSentEvent]:
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
        try:
            writer.write(resume_request(id))
            assert (await reader.readline()).split()[1] == b"200"
            await reader.readuntil(b"\r\n\r\n")
            received = await reader.readuntil(b"id: 1\ndata: 1\n\n")
            arrived.set()
            return EventParser().feed(received + await reader.read())
        finally:
            writer.close()

    for id in ids:
        store.append(id, chunks[0])
    arrivals = [asyncio.Event() for _ in range(READERS)]
    readers = [asyncio.create_task(read(ids[number % streams], arrivals[number])) for number in range(READERS)]
    for event in arrivals:
        await event.wait()
    assert 0 < count_connections(web_database) <= CONNECTIONS
    for chunk in chunks[1:]:
        for id in ids:
            store.append(id, chunk)
        await asyncio.sleep(0)
    for id in ids:
        store.complete(id)
    expected = [*(ServerSentEvent(chunk, id=chunk) for chunk in chunks), DONE]
    for received in await asyncio.gather(*readers):
        assert received == expected


TOTAL = 48 * 1024 * 1024  # characters


SIZES = {"small": 2048, "large": 65536}


@pytest.fixture(scope="module")
def long_streams(web_database):
    """The ids and chunks of streams of 48 MiB each, by the size of their chunks."""
    streams = {}
    with PostgresStreamStore(web_database) as store:
        for size in SIZES.values():
            chunks = [f"{number}".ljust(size, ".") for number in range(TOTAL // size)]
            id = store.create()
            while chunks_left := chunks[store.get_status(id).total_chunks :]:
                store.append_many(id, chunks_left[:1024])
            store.complete(id)
            streams[size] = id, chunks
    return streams


def resident_memory(client: Client) -> int:
    """Return the resident memory of all processes of a server in bytes."""
    statuses = [(process / "status").read_text() for process in client.processes()]
    return 1024 * sum(int(status.partition("VmRSS:")[2].split()[0]) for status in statuses)


@pytest.mark.skipif(not PROC, reason="needs /proc")
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_slow_reader_does_not_fill_the_memory_of_the_server(client, long_streams, size):
    id, chunks = long_streams[size]
    for _ in range(10):  # warm up the processes
        client.resume(id, len(chunks) - 10).read()
    before = resident_memory(client)
    peak = []
    with client.connect() as connection:
        connection.sendall(resume_request(id))
        for _ in range(10):  # without reading
            time.sleep(0.1)
            peak.append(resident_memory(client))
        received = bytearray()
        while piece := connection.recv(65536):
            received += piece
            if len(received) < 4_000_000:  # slowly at first, then at full speed
                time.sleep(0.005)
            if len(peak) * 500_000 < len(received):
                peak.append(resident_memory(client))
    assert max(peak) - before < TOTAL / 2
    [*stored, done] = EventParser().feed(received.partition(b"\r\n\r\n")[2])
    assert done == DONE
    assert [event.id for event in stored] == [f"{number}" for number in range(1, len(chunks) + 1)]
    assert [event.data for event in stored] == chunks


POLLED = f"query LIKE '%{POLL}%' AND query_start > clock_timestamp() - interval '2 seconds'"


@pytest.mark.skipif(not PROC, reason="needs /proc")
def test_disconnected_readers_leave_no_files_or_polls(client, store, web_database):
    def count_files() -> int:
        return sum(len(list((process / "fd").iterdir())) for process in client.processes())

    id = store.create()
    before = count_files()
    with ExitStack() as stack:
        connections = [stack.enter_context(client.connect()) for _ in range(100)]
        for connection in connections:
            connection.sendall(resume_request(id))
        # Files that were open before may be closed in the meantime.
        until(lambda: count_files() >= before + len(connections) - 10)
        until(lambda: count_connections(web_database, POLLED) > 0)
        for connection in connections:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    # More database connections may be open than before.
    until(lambda: count_files() <= before + len(connections) / 2)
    # Each process with readers polls at least once a second.
    until(lambda: count_connections(web_database, POLLED) == 0)
    for _ in range(50):  # no process has lost its threads
        assert client.post("/complete", {"input": "x"}).read() == b"x "
    store.stop(id)
