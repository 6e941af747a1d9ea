"""Clients that request a long stream and do not read it: they hold no threads and no pages of the server for long."""

from __future__ import annotations

import socket
from contextlib import ExitStack

import pytest
from support import servers, webapps
from support.concurrency import until
from support.webapps import SERVERS, Client

from aibind_postgres import PostgresStreamStore

CLIENTS = 60  # the servers with threads have 40
CHUNKS, SIZE = 256, 65_536  # more than the buffers of a connection hold


@pytest.fixture(scope="module")
def web_database(server, template):
    with servers.own_database(server, template) as dsn:
        yield dsn


@pytest.fixture(scope="module")
def long_stream(web_database):
    with PostgresStreamStore(web_database) as store:
        id = store.create()
        for _ in range(CHUNKS // 16):
            store.append_many(id, ["x" * SIZE] * 16)
        store.complete(id)
    return id


def stalled_client(client: Client, id: str) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(60)
    connection.connect(("127.0.0.1", client.port))
    connection.sendall(f"GET /__aibind__/stream/resume?id={id} HTTP/1.0\r\n\r\n".encode())
    return connection


@pytest.mark.parametrize("framework", [name for name in SERVERS if name != "fastapi"])
def test_stalled_clients_are_disconnected(framework, web_database, long_stream):
    with webapps.running(framework, web_database, SEND_TIMEOUT="1") as client, ExitStack() as stack:
        connections = [stack.enter_context(stalled_client(client, long_stream)) for _ in range(CLIENTS)]
        assert client.post("/complete", {"input": "x"}).read() == b"x "
        until(lambda: client.read_log().count(f"a client has not read stream '{long_stream}'") == CLIENTS)
        received = bytearray()
        try:
            while piece := connections[0].recv(1_000_000):
                received += piece
        except ConnectionResetError:
            pass
        assert b"data: x" in received
        assert b"event: done" not in received
        assert "Traceback" not in client.read_log()
