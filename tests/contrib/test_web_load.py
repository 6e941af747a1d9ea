"""The web frameworks under load: many readers, slow ones, and those who go away without a word."""

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
from contrib.contract import within

from aibind_postgres import PostgresStreamStore
from aibind_postgres.sse import EventParser, ServerSentEvent

if TYPE_CHECKING:
    from support.webapps import Client

READERS = 1000
PROC = Path("/proc/self/status").exists()
DONE = ServerSentEvent("", "done")

# Connections that a server with two processes may hold to its database: two pools of ten, and one more each.
CONNECTIONS = 2 * (10 + 1)


@pytest.fixture(scope="module", autouse=True)
def files():
    """Let this process, and the servers that it starts, have as many files open as there are readers, and more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < 2 * READERS:
        resource.setrlimit(resource.RLIMIT_NOFILE, (2 * READERS, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def resuming(id: str) -> bytes:
    # By the older protocol, whose answers end with their connections: what comes is the events, as they are.
    return f"GET /__aibind__/stream/resume?id={id} HTTP/1.0\r\n\r\n".encode()


def count(dsn: str, condition: str = "true") -> int:
    """Return how many connections a server has to its database of which a condition is true."""
    # By name: one of the test's own that has just been closed may still be listed.
    with psycopg.connect(dsn, autocommit=True, application_name="test") as connection:
        row = connection.execute(
            "SELECT count(*) FROM pg_stat_activity"
            f" WHERE datname = current_database() AND application_name <> 'test' AND {condition}"
        ).fetchone()
    return row[0]


@pytest.mark.parametrize("client", ["starlette"], indirect=True)
@pytest.mark.parametrize("streams", [1, 20])
async def test_a_thousand_readers_get_everything_once_and_wait_without_a_connection_each(
    client, store, web_database, streams
):
    ids = [store.create() for _ in range(streams)]
    chunks = [f"{number}" for number in range(1, 51)]

    async def read(id: str, arrived: asyncio.Event) -> list[ServerSentEvent]:
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
        try:
            writer.write(resuming(id))
            assert (await reader.readline()).split()[1] == b"200"
            await reader.readuntil(b"\r\n\r\n")
            received = await reader.readuntil(b"id: 1\ndata: 1\n\n")
            arrived.set()
            return EventParser().feed(received + await reader.read())
        finally:
            writer.close()

    for id in ids:
        store.append(id, chunks[0])
    here = [asyncio.Event() for _ in range(READERS)]
    readers = [asyncio.create_task(read(ids[number % streams], here[number])) for number in range(READERS)]
    for event in here:
        await event.wait()
    assert 0 < count(web_database) <= CONNECTIONS
    for chunk in chunks[1:]:
        for id in ids:
            store.append(id, chunk)
        await asyncio.sleep(0)
    for id in ids:
        store.complete(id)
    expected = [*(ServerSentEvent(chunk, id=chunk) for chunk in chunks), DONE]
    for received in await asyncio.gather(*readers):
        assert received == expected


TOTAL = 64 * 1024 * 1024  # characters


SIZES = {"small": 2048, "large": 65536}


@pytest.fixture(scope="module")
def long_streams(web_database):
    """Streams of 64 MiB each, by the size of their chunks: their ids and chunks."""
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


def memory(client: Client) -> int:
    """Return how many bytes of memory the processes of a server take up."""
    statuses = [(process / "status").read_text() for process in client.processes()]
    return 1024 * sum(int(status.partition("VmRSS:")[2].split()[0]) for status in statuses)


@pytest.mark.skipif(not PROC, reason="there is no /proc to see into the server with")
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_a_client_that_reads_slowly_makes_the_server_hold_no_more_than_a_page(client, long_streams, size):
    id, chunks = long_streams[size]
    for _ in range(10):  # so that the processes have what they need for any reader
        client.resume(id, len(chunks) - 10).read()
    before = memory(client)
    peak = []
    with client.connect() as line:
        line.sendall(resuming(id))
        for _ in range(10):  # nothing is read
            time.sleep(0.1)
            peak.append(memory(client))
        received = bytearray()
        while piece := line.recv(65536):
            received += piece
            if len(received) < 4_000_000:  # in small pieces, then all
                time.sleep(0.005)
            if len(peak) * 500_000 < len(received):
                peak.append(memory(client))
    assert max(peak) - before < TOTAL / 2
    [*told, done] = EventParser().feed(received.partition(b"\r\n\r\n")[2])
    assert done == DONE
    assert [event.id for event in told] == [f"{number}" for number in range(1, len(chunks) + 1)]
    assert [event.data for event in told] == chunks


POLLED = "query LIKE '%total_chunks FROM % WHERE id = ANY%' AND query_start > clock_timestamp() - interval '2 seconds'"


@pytest.mark.skipif(not PROC, reason="there is no /proc to see into the server with")
def test_readers_who_go_away_leave_nothing_behind(client, store, web_database):
    def files() -> int:
        return sum(len(list((process / "fd").iterdir())) for process in client.processes())

    id = store.create()
    before = files()
    with ExitStack() as stack:
        lines = [stack.enter_context(client.connect()) for _ in range(100)]
        for line in lines:
            line.sendall(resuming(id))
        within(30, lambda: files() >= before + len(lines) - 10)  # others may end
        within(30, lambda: count(web_database, POLLED) > 0)
        for line in lines:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    within(30, lambda: files() <= before + len(lines) / 2)  # it may have more connections to its database than before
    # Readers are asked for once a second at least, by each process that has some.
    within(30, lambda: count(web_database, POLLED) == 0)
    for _ in range(50):  # and no process has lost its threads to them
        assert client.post("/complete", {"input": "x"}).read() == b"x "
    store.stop(id)
