"""The time from an append to a reader in another process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import chain
from multiprocessing.connection import Connection as Pipe
from typing import TYPE_CHECKING, Any, TypeAlias

from .driver import cursor_append
from .measure import Missing, Results, Row, Target, at_most, compare, latencies
from .peers import NpmDesign, Redis, add_entry
from .processes import process

if TYPE_CHECKING:
    import psycopg

    from .bench import Bench
    from .tables import Tables

Send: TypeAlias = Callable[[str], object]

FAST, SLOW = 200, 30  # chunks per second
CHANNEL = "benchmark_floor"
REDIS_KEY = "tail"
WAKE_UP, END = "wake up", "end"  # chunks without a time

# Seconds. A store polls a stream that has not changed for a while once per second, until it finds a change.
SLOWEST_POLL = 1.2


def tail(bench: Bench) -> list[Row]:
    fast = send_rounds(bench, FAST, 2 * bench.size.seconds)
    slow = send_rounds(bench, SLOW, 3.5 * bench.size.seconds)
    polled = "the npm package's poll"
    return [
        *rows_at(FAST, fast, floor=at_most(1.5), blocked=None),
        *rows_at(SLOW, slow, floor=at_most(1.3), blocked=at_most(1.6)),
        compare(work_at(SLOW, "p50"), "p50", slow["store"], polled, slow["npm"], at_most(1 / 30)),
        compare(work_at(SLOW, "p99"), "p99", slow["store"], polled, slow["npm"]),
        compare(work_at(SLOW, "without notifications, p50"), "p50", slow["silent"], polled, slow["npm"]),
    ]


def work_at(rate: int, figure: str) -> str:
    return f"chunk to a reader in another process, {rate}/s, {figure}"


def rows_at(rate: int, found: dict[str, Results], floor: Target, blocked: Target | None) -> list[Row]:
    ours, plain, xread = found["store"], "append, NOTIFY and SELECT, raw cursors", "Redis XREAD BLOCK, appendfsync"
    return [
        compare(work_at(rate, "p50"), "p50", ours, plain, found["floor"], floor),
        compare(work_at(rate, "p99"), "p99", ours, plain, found["floor"], at_most(2.5)),
        compare(work_at(rate, "p50"), "p50", ours, f"{xread} always", found["always"], blocked),
        compare(work_at(rate, "p99"), "p99", ours, f"{xread} always", found["always"]),
        compare(work_at(rate, "p50"), "p50", ours, f"{xread} everysec", found["everysec"]),
    ]


def send_rounds(bench: Bench, rate: int, seconds: float) -> dict[str, Results]:
    """Send chunks by each method in turn, for some seconds each. Each reader is a process; all share one clock."""
    count = round(rate * seconds)
    tables = bench.tables(f"tail_{rate}")
    # PostgreSQL wakes all listening sessions of a database, and the silent streams must not be notified.
    floor_tables, silent_tables = bench.database(f"floor_{rate}"), bench.database(f"silent_{rate}")
    found: dict[str, Results] = {}
    with ExitStack() as stack:
        senders: dict[str, Send] = {}
        readers: dict[str, Pipe] = {}
        store = stack.enter_context(tables.store())
        stream = store.create()
        senders["store"] = lambda text: store.append(stream, text)
        readers["store"] = stack.enter_context(process(tail_store, tables, stream))

        floor_stream = new_stream(floor_tables)
        senders["floor"] = append_and_notify(stack.enter_context(floor_tables.connect()), floor_tables, floor_stream)
        readers["floor"] = stack.enter_context(process(tail_floor, floor_tables, floor_stream))

        for policy, server in bench.redis.items():
            if isinstance(server, Missing):
                found[policy] = Results(missing=server.reason)
                continue
            client = stack.enter_context(server.connect())
            client.delete(REDIS_KEY)
            senders[policy] = partial(add_entry, client, REDIS_KEY)
            readers[policy] = stack.enter_context(process(tail_redis, server))

        if rate == SLOW:
            silent = new_stream(silent_tables)
            connection, statement = stack.enter_context(silent_tables.connect()), NpmDesign(silent_tables).append
            senders["silent"] = lambda text: connection.execute(statement, [silent, text], prepare=False)
            readers["silent"] = stack.enter_context(process(tail_store, silent_tables, silent))
            readers["npm"] = stack.enter_context(process(tail_npm, silent_tables, silent))

        for send in senders.values():
            send("first chunk: its reader reports that it is ready")
        for pipe in readers.values():
            pipe.recv()
        time.sleep(min(1, bench.size.settle))  # until all readers listen
        for number in range(bench.size.rounds):
            for name, send in senders.items():
                bench.step(f"{rate}/s, round {number + 1} of {bench.size.rounds}: {name}")
                send(WAKE_UP)
                time.sleep(min(SLOWEST_POLL, bench.size.settle) if name == "silent" else 0.1)
                send_at(rate, count, send)
        for send in senders.values():
            send(END)
        for name, pipe in readers.items():
            found[name] = in_rounds(pipe.recv(), count)
    return found


def new_stream(tables: Tables) -> str:
    with tables.store() as store:
        return store.create()


def send_at(rate: int, count: int, send: Send) -> None:
    """Send chunks at a fixed rate. Each contains the time at which its append begins."""
    due = time.monotonic()
    for _ in range(count):
        due += 1 / rate
        time.sleep(max(0.0, due - time.monotonic()))
        send(str(time.monotonic()))


def in_rounds(delays: list[float], count: int) -> Results:
    results = Results()
    for start in range(0, len(delays), count):
        results.add(latencies(delays[start : start + count]))
    return results


def append_and_notify(connection: psycopg.Connection[Any], tables: Tables, stream: str) -> Send:
    """Return the plain way to append and notify: two statements on one connection."""
    append, cursor = cursor_append(connection, tables), connection.cursor(binary=True)

    def send(text: str) -> None:
        append(stream, text)
        cursor.execute("SELECT pg_notify($1, $2)", [CHANNEL, stream], prepare=True)

    return send


def notified_chunks(tables: Tables, stream: str) -> Iterator[str]:
    """Read as plainly: LISTEN on one connection, and SELECT on another one."""
    statement = f"SELECT seq, data FROM {tables.chunks} WHERE id = $1 AND seq > $2 ORDER BY seq"
    with tables.connect() as listening, tables.connect() as reading:
        listening.execute(f"LISTEN {CHANNEL}")
        cursor, last = reading.cursor(binary=True), 0
        for _ in chain([None], listening.notifies()):
            for seq, text in cursor.execute(statement, [stream, last], prepare=True).fetchall():
                yield text
                last = seq


def tail_store(pipe: Pipe, tables: Tables, stream: str) -> None:
    with tables.store() as store:
        report(pipe, (chunk.data for chunk in store.read_from(stream)))


def tail_floor(pipe: Pipe, tables: Tables, stream: str) -> None:
    report(pipe, notified_chunks(tables, stream))


def tail_npm(pipe: Pipe, tables: Tables, stream: str) -> None:
    with tables.connect() as connection:
        report(pipe, (data for _, data in NpmDesign(tables).read(connection, stream)))


def tail_redis(pipe: Pipe, server: Redis) -> None:
    report(pipe, redis_entries(server))


def redis_entries(server: Redis) -> Iterator[str]:
    last = "0"
    with server.connect() as client:
        while True:
            found: Any = client.xread({REDIS_KEY: last}, block=0)
            streams = found.items() if isinstance(found, dict) else found
            for _, batch in streams:
                for entry, fields in batch:
                    yield fields["data"]
                    last = entry


def report(pipe: Pipe, texts: Iterable[str]) -> None:
    """Report the arrival of the first chunk, and at the end the delays of the chunks with a time."""
    delays = []
    for number, text in enumerate(texts):
        if text == END:
            break
        if number == 0:
            pipe.send("reading")
        elif text != WAKE_UP:
            delays.append(time.monotonic() - float(text))
    pipe.send(delays)
