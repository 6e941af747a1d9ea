"""Answers of the handler for useChat over HTTP: the first token, and a thousand readers of a hundred answers."""

from __future__ import annotations

import asyncio
import json
import re
import time
from contextlib import ExitStack
from http.client import HTTPConnection, HTTPResponse
from multiprocessing.connection import Connection as Pipe
from statistics import mean
from typing import TYPE_CHECKING

from aibind_postgres.history import new_id

from .chats import TOKENS_PER_SECOND, WARM_UP
from .measure import Figures, Results, Row, at_least, at_most, compare, latencies
from .processes import process
from .web_server import allow_connections, question, serve

if TYPE_CHECKING:
    from .bench import Bench
    from .tables import Tables

HOST = "127.0.0.1"
DELTA = b'data: {"type":"text-delta"'
REQUESTS_PER_SECOND = 50  # of each kind, about

READERS_PER_ANSWER = 10
CLIENTS = 2  # processes with readers; one would be slower than the server
AT_ONCE = 20  # clients that connect at the same time
SETTLE = 0.05  # seconds; a client that leaves while its server reads a page costs a connection
TIME = re.compile(rb'"delta":"([0-9.]+)"')


def first_token(bench: Bench) -> list[Row]:
    """Ask new chats for an answer, and a route that stores nothing, in turn."""
    tables, count = bench.tables("first_token"), round(bench.size.seconds * REQUESTS_PER_SECOND)
    paths = {"ours": "/api/chat", "bare": "/bare"}
    found = {name: Results() for name in paths}
    with process(serve, tables) as pipe:
        connection = HTTPConnection(HOST, pipe.recv())
        for number in range(bench.size.rounds + 1):  # the first one warms up
            bench.step(f"round {number} of {bench.size.rounds}")
            delays: dict[str, list[float]] = {name: [] for name in paths}
            for _ in range(count):
                for name, path in paths.items():
                    delays[name].append(time_to_token(connection, path))
            if number:
                for name in paths:
                    found[name].add(latencies(delays[name]))
        connection.close()
    work, peer = "first token of useChat over HTTP", "StreamingResponse that stores nothing"
    ours, bare = found["ours"], found["bare"]
    more = [total - base for total, base in zip(ours.figures["p50"], bare.figures["p50"], strict=True)]
    return [
        compare(f"{work}, p50", "p50", ours, peer, bare),
        compare(f"{work}, p99", "p99", ours, peer, bare),
        Row(f"{work}, p50, beyond a {peer}", "ms", more, target=at_most(5)),
    ]


def time_to_token(connection: HTTPConnection, path: str) -> float:
    """Send a question and read the whole answer. Return the seconds until the first token."""
    chat = new_id()
    body = json.dumps(question(chat, "hello"))
    start = time.perf_counter()
    connection.request("POST", path, body, {"Content-Type": "application/json", "User": "ann"})
    response = connection.getresponse()
    read_token(response)
    delay = time.perf_counter() - start
    response.read()
    return delay


def read_token(response: HTTPResponse) -> None:
    line = b""
    while not line.startswith(DELTA):
        line = response.readline()
        if not line:
            raise RuntimeError(f"status {response.status} without a token")


def http_readers(bench: Bench) -> list[Row]:
    """Follow live answers over HTTP. The server produces them itself, as one worker process of an application does."""
    answers = max(1, bench.size.readers // READERS_PER_ANSWER)
    results = Results()
    for number in range(bench.size.long_rounds):
        bench.step(f"round {number + 1} of {bench.size.long_rounds}")
        results.add(live_round(bench.tables(f"http_readers_{number}"), answers, bench.size.live_seconds))
    figures = results.figures
    work = f"{answers * READERS_PER_ANSWER:,} readers of {answers} answers over HTTP, {TOKENS_PER_SECOND} tokens/s each"
    return [
        Row(f"{work}: share of the tokens that arrived", "", figures["share"], target=at_least(1)),
        Row(f"{work}: time taken, relative to the ideal", "", figures["pace"]),
        Row(f"{work}: write to reader, p50", "ms", figures["p50"]),
        Row(f"{work}: write to reader, p99", "ms", figures["p99"]),
        Row(f"{work}: processor time of the server, of one core", "%", figures["server"]),
        Row(f"{work}: processor time of each client process, of one core", "%", figures["client"]),
    ]


def live_round(tables: Tables, answers: int, seconds: int) -> Figures:
    tokens = WARM_UP + seconds * TOKENS_PER_SECOND
    with ExitStack() as stack:
        server = stack.enter_context(process(serve, tables, answers, tokens, TOKENS_PER_SECOND))
        port: int = server.recv()
        chats = [start_answer(port, number) for number in range(answers)]
        readers = chats * READERS_PER_ANSWER
        clients = [
            stack.enter_context(process(follow, port, readers[number::CLIENTS], 1 + tokens))
            for number in range(CLIENTS)
        ]
        for client in clients:
            client.recv()
        begin = time.monotonic() + 1
        server.send(begin)
        before: float = server.recv()
        delays: list[float] = []
        busy, last, received = [], 0.0, 0
        for client in clients:
            found: tuple[list[float], int, float, float] = client.recv()
            delays += found[0]
            received += found[1]
            last = max(last, found[2])
            busy.append(found[3])
        server.send(None)
        processor: float = server.recv() - before
    elapsed = last - begin
    ideal = tokens / TOKENS_PER_SECOND
    return {
        "share": received / (len(readers) * (1 + tokens)),
        "pace": elapsed / ideal,
        "server": 100 * processor / elapsed,
        "client": 100 * mean(busy) / elapsed,
        **latencies(delays),
    }


def start_answer(port: int, number: int) -> tuple[str, str]:
    """Ask for an answer, and leave before it ends. Return the path of the running answer, and its user."""
    user, chat = f"user-{number}", f"chat-{number}"
    connection = HTTPConnection(HOST, port)
    body = json.dumps(question(chat, str(number)))
    connection.request("POST", "/api/chat", body, {"Content-Type": "application/json", "User": user})
    response = connection.getresponse()
    read_token(response)
    time.sleep(SETTLE)
    response.close()
    connection.close()
    return f"/api/chat/{chat}/stream", user


class Reader(asyncio.Protocol):
    """One client of a running answer. It does as little as possible, since it shares the processor with the server."""

    def __init__(self, path: str, user: str, delays: list[float]) -> None:
        self._request = f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\nUser: {user}\r\n\r\n".encode()
        self._delays = delays
        self._rest = b""
        self.tokens = 0
        self.last = 0.0  # when the last token has arrived
        self.started = asyncio.Event()
        self.ended = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        # The server does not split an event between two chunks of the HTTP response, but TCP may split anything.
        events, end, self._rest = (self._rest + data).rpartition(b"\n\n")
        times = TIME.findall(events)
        if times:
            self.last = now
            for written in times:
                self.tokens += 1
                if self.tokens > 1 + WARM_UP:
                    self._delays.append(now - float(written))
            self.started.set()
        if b"[DONE]" in events + end:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.started.set()
        self.ended.set()


def follow(pipe: Pipe, port: int, readers: list[tuple[str, str]], tokens: int) -> None:
    """Child process: follow running answers. Report when all readers have a token, and their figures at the end.

    The figures are the delays of the tokens after the warm-up, the number of all tokens, the time of the last one, and
    the processor time.
    """
    allow_connections()
    delays: list[float] = []

    async def run() -> None:
        loop, limit = asyncio.get_running_loop(), asyncio.Semaphore(AT_ONCE)

        async def connect(path: str, user: str) -> Reader:
            async with limit:
                _, reader = await loop.create_connection(lambda: Reader(path, user, delays), HOST, port)
                await reader.started.wait()
            if not reader.tokens:
                raise RuntimeError("the server has closed the connection before the first token")
            return reader

        protocols = await asyncio.gather(*(connect(*reader) for reader in readers))
        before = time.process_time()
        pipe.send("reading")
        for reader in protocols:
            await reader.ended.wait()
        processor = time.process_time() - before
        received = sum(reader.tokens for reader in protocols)
        pipe.send((delays, received, max(reader.last for reader in protocols), processor))

    asyncio.run(run())
