"""Live reading: many chats in one process, and a reader in another process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection as Pipe
from typing import TYPE_CHECKING, Any

from .measure import Figures, Missing, Results, Row, at_most, compare, latencies
from .peers import NpmDesign, Redis, add_entry
from .processes import process, run_all
from .tables import Tables

if TYPE_CHECKING:
    from .bench import Bench

CHATS = 200
TOKENS_PER_SECOND = 30

CHUNKS_PER_ROUND = 100
PAUSE = 0.02  # seconds after each chunk of a writer: 50 chunks per second


def chats(bench: Bench) -> list[Row]:
    tables = bench.tables("chats")
    seconds = 3 if bench.quick else 8
    found = bench.run_interleaved(
        {"writers": lambda: asyncio.run(chat(tables, seconds))}, rounds=1 if bench.quick else 3
    )
    work, figures = f"{CHATS} chats, {TOKENS_PER_SECOND} tokens/s each", found["writers"].figures
    return [
        Row(f"{work}: time taken, relative to the ideal", "", figures["pace"], target=at_most(1.1)),
        Row(f"{work}: write to reader, p50", "ms", figures["p50"]),
        Row(f"{work}: write to reader, p99", "ms", figures["p99"], target=at_most(50)),
    ]


async def chat(tables: Tables, seconds: int) -> Figures:
    """Write all streams at a fixed pace, each with its own writer, and read each with one reader in this process."""
    tokens = seconds * TOKENS_PER_SECOND
    delays: list[float] = []
    async with tables.async_store() as store:
        streams = [await store.create() for _ in range(CHATS)]
        begin = time.monotonic() + 1  # by then all readers wait

        async def read(stream: str) -> None:
            async for chunk in store.read_from(stream):
                delays.append(time.monotonic() - float(chunk.data))

        async def write(stream: str, first: float) -> None:
            async with store.writer(stream) as writer:
                for number in range(tokens):
                    await asyncio.sleep(first + number / TOKENS_PER_SECOND - time.monotonic())
                    await writer.write(str(time.monotonic()))

        await run_all(
            *map(read, streams),
            # The writers start at different times, since real chats are not synchronized.
            *(write(s, begin + index / CHATS / TOKENS_PER_SECOND) for index, s in enumerate(streams)),
        )
        elapsed = time.monotonic() - begin
    if len(delays) != CHATS * tokens:
        raise RuntimeError(f"readers received {len(delays)} of {CHATS * tokens} tokens")
    return {"pace": elapsed / seconds, **latencies(delays)}


def tail(bench: Bench) -> list[Row]:
    """Send a chunk by each method in turn. Each reader is a process; all processes share one clock."""
    tables, silent_tables = bench.tables("tail"), bench.database("silent")
    senders: dict[str, Callable[[str], object]] = {}
    missing: dict[str, str] = {}
    with ExitStack() as stack:
        store, silent_store = stack.enter_context(tables.store()), stack.enter_context(silent_tables.store())
        notified, silent = store.create(), silent_store.create()
        plain, npm = stack.enter_context(silent_tables.connect()), NpmDesign(silent_tables)

        def write_silently(text: str) -> None:
            plain.execute(npm.append, [silent, text], prepare=False)

        senders["notified"] = lambda text: store.append(notified, text)
        senders["silent"] = write_silently
        readers = {
            "notified": stack.enter_context(process(tail_store, tables, notified)),
            "silent": stack.enter_context(process(tail_store, silent_tables, silent)),
            "npm": stack.enter_context(process(tail_npm, silent_tables, silent)),
        }
        for policy, server in bench.redis.items():
            if isinstance(server, Missing):
                missing[policy] = server.reason
                continue
            client = stack.enter_context(server.connect())
            senders[policy] = partial(add_entry, client, "tail")
            readers[policy] = stack.enter_context(process(tail_redis, server))

        for send in senders.values():
            send("first chunk: its reader reports that it is ready")
        for pipe in readers.values():
            pipe.recv()
        time.sleep(1)  # until all readers listen
        due = time.monotonic()
        for number in range(bench.rounds):
            bench.step(f"round {number + 1} of {bench.rounds}")
            for _ in range(CHUNKS_PER_ROUND):
                for send in senders.values():
                    due += PAUSE / len(senders)
                    time.sleep(max(0.0, due - time.monotonic()))
                    send(str(time.monotonic()))
        store.complete(notified)
        silent_store.complete(silent)
        for policy in bench.redis.keys() & senders.keys():
            senders[policy](END)
        found = {name: in_rounds(pipe.recv()) for name, pipe in readers.items()}
    found |= {policy: Results(missing=reason) for policy, reason in missing.items()}
    work, blocked = "chunk to a reader in another process", "Redis XREAD BLOCK, appendfsync"
    ours, polled = found["notified"], "the npm package's poll"
    return [
        compare(f"{work}, p50", "p50", ours, f"{blocked} always", found["always"], at_most(1.3)),
        compare(f"{work}, p99", "p99", ours, f"{blocked} always", found["always"]),
        compare(f"{work}, p50", "p50", ours, f"{blocked} everysec", found["everysec"]),
        compare(f"{work}, p50", "p50", ours, polled, found["npm"], at_most(1 / 30)),
        compare(f"{work}, p99", "p99", ours, polled, found["npm"]),
        compare(f"{work}, without notifications, p50", "p50", found["silent"], polled, found["npm"]),
    ]


def in_rounds(delays: list[float]) -> Results:
    results = Results()
    for start in range(0, len(delays), CHUNKS_PER_ROUND):
        results.add(latencies(delays[start : start + CHUNKS_PER_ROUND]))
    return results


END = "end"


def tail_store(pipe: Pipe, tables: Tables, stream: str) -> None:
    with tables.store() as store:
        report(pipe, (chunk.data for chunk in store.read_from(stream)))


def tail_npm(pipe: Pipe, tables: Tables, stream: str) -> None:
    with tables.connect() as connection:
        report(pipe, (data for _, data in NpmDesign(tables).read(connection, stream)))


def tail_redis(pipe: Pipe, server: Redis) -> None:
    report(pipe, redis_entries(server))


def redis_entries(server: Redis) -> Iterator[str]:
    last = "0"
    with server.connect() as client:
        while True:
            found: Any = client.xread({"tail": last}, block=0)
            streams = found.items() if isinstance(found, dict) else found
            for _, batch in streams:
                for entry, fields in batch:
                    if fields["data"] == END:
                        return
                    yield fields["data"]
                    last = entry


def report(pipe: Pipe, texts: Iterable[str]) -> None:
    """Report the arrival of the first chunk, and at the end the delays of the others."""
    delays = []
    for number, text in enumerate(texts):
        if number == 0:
            pipe.send("reading")
        else:
            delays.append(time.monotonic() - float(text))
    pipe.send(delays)
