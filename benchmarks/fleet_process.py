"""One process of a fleet: it writes its streams, reads streams of any process, and counts its own costs."""

from __future__ import annotations

import asyncio
import math
import time
from array import array
from binascii import a2b_base64, b2a_base64
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection as Pipe
from typing import TYPE_CHECKING, Any, NamedTuple
from zlib import crc32

from aibind_postgres import _notifications
from aibind_postgres._async import listening

from .processes import peak_memory, run_all
from .tables import Tables

if TYPE_CHECKING:
    from aibind_postgres import AsyncPostgresStreamStore

# A token is the time of its write in 24 bits, as 4 characters: the length of an average token.
TICKS, WRAP = 100_000, 1 << 24  # per second; all 168 seconds
DRAIN = 120.0  # seconds after the measurement within which each reader must receive the end of its stream

READY = "ready"

# Keys of the counts, besides the names of statements.
RECEIVED, SENT = "notifications received", "notifications sent"
DIGESTS, FOLLOWED = "digests received", "digests of followed streams"


class Part(NamedTuple):
    """The part of one process in the fleet."""

    tables: Tables
    written: Sequence[str]  # the streams that it writes
    read: Sequence[str]  # the streams that it reads, once for each reader
    rate: float  # tokens of each stream in one second
    notify: bool  # whether its store notifies other processes


class Content(NamedTuple):
    """The number of tokens of a stream, and the checksum of their texts."""

    tokens: int = 0
    checksum: int = 0

    def followed_by(self, token: str) -> Content:
        return Content(self.tokens + 1, crc32(token.encode(), self.checksum))


@dataclass
class Report:
    """The figures of one process, of the time of the measurement unless stated otherwise."""

    seconds: float = 0.0
    processor: float = 0.0  # seconds of processor time
    counts: Counter[str] = field(default_factory=Counter)
    delays: array[float] = field(default_factory=lambda: array("d"))  # seconds from a write to a reader
    memory: float = 0.0  # MiB
    written: dict[str, Content] = field(default_factory=dict)  # in the whole run
    read: list[tuple[str, Content]] = field(default_factory=list)  # by each reader in the whole run


def stamp(now: float) -> str:
    """Return a token for the time of its write."""
    return b2a_base64((int(now * TICKS) % WRAP).to_bytes(3, "big"), newline=False).decode()


def delay_of(token: str, now: float) -> float:
    """Return the seconds since the time of a token."""
    return (int(now * TICKS) - int.from_bytes(a2b_base64(token), "big")) % WRAP / TICKS


def run_part(pipe: Pipe, part: Part) -> None:
    """Child process: send "ready" when each reader has a token, receive the times of the measurement, send a report.

    Instead of the report, send the text of an error.
    """
    try:
        asyncio.run(FleetProcess(part).run(pipe))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


class FleetProcess:
    """The writers and readers of one process, on one store."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._report = Report()
        self._counts: Counter[str] = Counter()
        self._begin = self._end = math.inf
        self._started, self._finished = asyncio.Semaphore(0), asyncio.Semaphore(0)  # readers

    async def run(self, pipe: Pipe) -> None:
        part = self._part
        async with part.tables.async_store(notify=part.notify) as store:
            count_statements(store, part.tables, self._counts)
            count_notifications(store, self._counts)
            readers = (self._read(store, stream) for stream in part.read)
            writers = (self._write(store, number, stream) for number, stream in enumerate(part.written))
            await run_all(self._measure(pipe), *readers, *writers)
        pipe.send(self._report)

    async def _write(self, store: AsyncPostgresStreamStore, number: int, stream: str) -> None:
        written, pause = Content(), 1 / self._part.rate
        due = time.monotonic() + pause * number / len(self._part.written)  # the streams are not synchronized
        async with store.writer(stream) as writer:
            while due < self._end:
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                due += pause
                token = stamp(time.monotonic())
                await writer.write(token)
                written = written.followed_by(token)
        self._report.written[stream] = written

    async def _read(self, store: AsyncPostgresStreamStore, stream: str) -> None:
        read, delays = Content(), self._report.delays
        async for seq, token in store.read_from(stream):
            now = time.monotonic()
            read = read.followed_by(token)
            if seq != read.tokens:
                raise RuntimeError(f"a reader received token {seq} of stream {stream} in place of token {read.tokens}")
            if seq == 1:
                self._started.release()
            delay = delay_of(token, now)
            if self._begin <= now - delay < self._end:
                delays.append(delay)
        self._report.read.append((stream, read))
        self._finished.release()

    async def _measure(self, pipe: Pipe) -> None:
        for _ in self._part.read:
            await self._started.acquire()
        pipe.send(READY)
        begin, end = await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
        await asyncio.sleep(begin - time.monotonic())
        self._begin, self._end = begin, end
        started, processor, counts = time.monotonic(), time.process_time(), Counter(self._counts)
        await asyncio.sleep(end - time.monotonic())
        self._report.seconds = time.monotonic() - started
        self._report.processor = time.process_time() - processor
        self._report.counts = self._counts - counts
        self._report.memory = peak_memory()
        for number in range(len(self._part.read)):
            try:
                await asyncio.wait_for(self._finished.acquire(), max(0.0, end + DRAIN - time.monotonic()))
            except asyncio.TimeoutError as error:
                late = len(self._part.read) - number
                raise RuntimeError(f"{late} readers have not received the end of their streams") from error


def count_statements(store: AsyncPostgresStreamStore, tables: Tables, counts: Counter[str]) -> None:
    """Count the statements of a store by their names."""
    names = {text: name for name, text in vars(tables.sql).items()}
    client = store._database.client
    query = client.query

    async def counted(sql: str, *arguments: Any) -> Any:
        counts[names.get(sql, "other")] += 1
        return await query(sql, *arguments)

    client.query = counted  # type: ignore[method-assign, assignment]  # replaces a method of this object


def count_notifications(store: AsyncPostgresStreamStore, counts: Counter[str]) -> None:
    """Count the notifications that a store receives, including its own: each session receives those of all."""
    decode, followed = _notifications.decode_payload, store._subscriptions._ids

    def counted(payload: str, receiver: str) -> list[str]:
        digests = decode(payload, receiver)
        counts[RECEIVED] += 1
        if digests:
            counts[DIGESTS] += len(digests)
            counts[FOLLOWED] += sum(map(followed.__contains__, digests))
        else:
            counts[SENT] += 1
        return digests

    listening.decode_payload = counted  # type: ignore[attr-defined]  # a name that the module imports
