"""Runs one fleet of processes on a database, and checks that no reader misses a token."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain
from multiprocessing.connection import Connection as Pipe
from random import Random
from statistics import mean, median
from typing import Any

from psycopg.conninfo import make_conninfo

from .fleet_figures import Run, Size
from .fleet_process import DIGESTS, DRAIN, FOLLOWED, READY, RECEIVED, SENT, Part, Report, run_part, stamp
from .measure import latencies
from .processes import process
from .server_load import connections, load
from .tables import Tables

START = 180.0  # seconds within which each reader must receive its first token
APPLICATION = "fleet"


def run_fleet(
    tables: Tables, size: Size, seconds: float, settle: float, step: Callable[[str], None], series: str = ""
) -> Run:
    """Run a fleet.

    Args:
        tables: New tables.
        size: The size of the fleet.
        seconds: The duration of the measurement.
        settle: Seconds from the first token of each reader until the measurement.
        step: Shows the progress.
        series: The name of the series to which the run belongs.

    Raises:
        RuntimeError: A reader has missed a token, or has not received the end of its stream in time.
    """
    step(f"starting {size}")
    fleet = tables._replace(dsn=make_conninfo(tables.dsn, application_name=APPLICATION))
    with tables.connect() as admin, tables.store() as store, ExitStack() as stack:
        streams, silent = [store.create() for _ in range(size.streams)], store.create()
        store.append(silent, stamp(time.monotonic()))
        pipes = [stack.enter_context(process(run_part, part)) for part in parts(fleet, size, streams)]
        # A process without any of the streams: the cost of the notifications of others.
        idle_pipe = stack.enter_context(process(run_part, Part(fleet, [], [silent], size.rate, size.notify)))
        for pipe in [*pipes, idle_pipe]:
            receive(pipe, START)
        samples = [connections(admin, APPLICATION)]
        time.sleep(settle)
        begin = time.monotonic() + 0.2
        end = begin + seconds
        for pipe in [*pipes, idle_pipe]:
            pipe.send((begin, end))
        step(str(size))
        time.sleep(max(0.0, begin - time.monotonic()))
        before = load(admin, tables)
        while (remaining := end - time.monotonic()) > 0:
            time.sleep(min(1.0, remaining))
            samples.append(connections(admin, APPLICATION))
        server = load(admin, tables).since(before)
        step(f"reading to the ends: {size}")
        store.complete(silent)
        reports: list[Report] = [receive(pipe, seconds + DRAIN) for pipe in pipes]
        idle: Report = receive(idle_pipe, DRAIN)
    check(reports, size.readers)
    counts = sum((report.counts for report in reports), Counter[str]())
    delays = list(chain.from_iterable(report.delays for report in reports))
    pooled, listening = zip(*samples, strict=True)
    return Run(
        series=series,
        size=size,
        seconds=server.seconds,
        tokens=server.tokens,
        deliveries=len(delays),
        **latencies(delays),
        pooled=round(median(pooled)),
        most_pooled=max(pooled),
        listening=max(listening),
        sent=counts.pop(SENT, 0),
        received=counts.pop(RECEIVED, 0),
        digests=counts.pop(DIGESTS, 0),
        followed=counts.pop(FOLLOWED, 0),
        processor=sum(report.processor for report in reports),
        idle_received=idle.counts[RECEIVED],
        idle_processor=idle.processor,
        server_processor=server.processor,
        busy=server.busy,
        statements=dict(counts),
        memory=mean(report.memory for report in reports),
        wal=server.wal,
        page_images=server.page_images,
        disk=server.disk,
    )


def parts(tables: Tables, size: Size, streams: Sequence[str]) -> Iterator[Part]:
    """Yield the part of each process: streams in turn, and readers at random, as a load balancer distributes them."""
    random = Random(size.readers)
    readers: list[list[str]] = [[] for _ in range(size.processes)]
    for number in range(size.readers):
        random.choice(readers).append(streams[number % size.streams])
    for number, read in enumerate(readers):
        yield Part(tables, streams[number :: size.processes], read, size.rate, size.notify)


def receive(pipe: Pipe, timeout: float) -> Any:
    """Return the next message of a process of the fleet. Raise `RuntimeError` if it has failed or sends nothing."""
    if not pipe.poll(timeout):
        raise RuntimeError(f"a process of the fleet has sent nothing for {timeout:.0f} s")
    try:
        answer = pipe.recv()
    except EOFError:
        raise RuntimeError("a process of the fleet has died") from None
    if isinstance(answer, str) and answer != READY:
        raise RuntimeError(f"a process of the fleet has failed: {answer}")
    return answer


def check(reports: Sequence[Report], readers: int) -> None:
    """Raise `RuntimeError` unless each of so many readers has received all tokens of its stream, in order."""
    written = {stream: content for report in reports for stream, content in report.written.items()}
    read = [found for report in reports for found in report.read]
    if len(read) != readers:
        raise RuntimeError(f"{len(read)} of {readers} readers have ended")
    for stream, content in read:
        if content != written[stream]:
            raise RuntimeError(f"a reader of stream {stream} has received {content}, but {written[stream]} was written")
