"""The size of a fleet, and the figures of its run. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

PROCESSES, STREAMS, READERS, RATE = 64, 2_000, 4_000, 30.0  # of the largest fleet; tokens/s of a stream
CONNECTIONS = 11  # of one store at most: ten of its pool, and the one that listens
SPARE = 20  # connections of a server for its administrator and for other programs
MEMORY = 128  # MiB for one process with its connections, of the half of the memory that a fleet may use
KEPT_UP = 0.97  # the share of the wanted tokens with which a fleet keeps up
TOKENS_PER_CORE = 750  # in one second, with two readers of each token, and the server on the same machine


class Size(NamedTuple):
    processes: int
    streams: int
    readers: int
    rate: float  # tokens of each stream in one second
    notify: bool = True  # else readers find tokens by polling

    @property
    def tokens(self) -> float:
        """The tokens of all streams in one second."""
        return self.streams * self.rate

    def __str__(self) -> str:
        polling = "" if self.notify else ", polling"
        return (
            f"{self.processes} processes, {self.streams:,} streams of {self.rate:.3g} tokens/s, "
            f"{self.readers:,} readers{polling}"
        )


def largest(cores: int, memory: float, max_connections: int) -> Size:
    """Return the largest fleet for a machine and its server.

    Connections and memory limit the processes. Streams and readers are in proportion to them. The cores limit the
    tokens.

    Args:
        cores: The number of processors.
        memory: The available memory in MiB.
        max_connections: The server's setting of this name.
    """
    by_connections = (max_connections - SPARE) // CONNECTIONS
    processes = max(2, min(PROCESSES, by_connections, int(memory / 2 / MEMORY)))
    return fleet_of(processes, cores * TOKENS_PER_CORE)


def fleet_of(processes: int, tokens: float, streams_of: int | None = None) -> Size:
    """Return a fleet of so many processes.

    Args:
        processes: The number of processes.
        tokens: The tokens of all streams in one second; fewer if a stream would exceed `RATE`.
        streams_of: The number of processes whose streams and readers it has; by default the same.
    """
    part = (streams_of or processes) / PROCESSES
    streams = max(1, round(STREAMS * part))
    return Size(processes, streams, round(READERS * part), min(RATE, tokens / streams))


def growing(most: Size) -> list[tuple[str, Size]]:
    """Return fleets up to this size, each with the name of its series."""
    processes, tokens = most.processes, most.tokens
    fewer = [processes >> steps for steps in (4, 3, 2, 1, 0) if processes >> steps >= 2]
    quarter = max(2, processes // 4)
    return [
        *(("processes", fleet_of(count, tokens / 2, processes)) for count in fewer),
        *(("tokens", fleet_of(quarter, tokens * factor)) for factor in (0.25, 0.5, 1, 1.5, 2, 3)),
        ("polling", fleet_of(quarter, tokens / 2)._replace(notify=False)),
        ("largest", most),
    ]


@dataclass(frozen=True)
class Run:
    """The figures of one run. Counts and times are of the whole measurement and of all processes together."""

    series: str
    size: Size
    seconds: float
    tokens: int  # stored
    deliveries: int  # tokens that readers received
    p50: float  # milliseconds from the write of a token to a reader
    p99: float
    pooled: int  # connections of pools, the median
    most_pooled: int
    listening: int  # connections that listen
    sent: int  # notifications
    received: int  # by all processes, each of which receives those of all
    digests: int  # of changed streams, in notifications of other processes
    followed: int  # of streams that the receiving process follows
    processor: float  # seconds of processor time of the processes
    idle_received: int  # notifications that a process without any of the streams received
    idle_processor: float  # seconds of its processor time
    server_processor: float | None  # None if the server is on another machine
    busy: float | None  # seconds of processor time of all programs on this machine
    statements: Mapping[str, int]  # by name
    memory: float  # MiB of a process, the mean of their peaks
    wal: int  # bytes
    page_images: int  # full pages in the write-ahead log
    disk: int  # bytes of the tables and their indexes

    @property
    def reached(self) -> float:
        """The share of the wanted tokens that were stored."""
        return self.tokens / self.seconds / self.size.tokens

    @property
    def idle_cost(self) -> float:
        """Seconds of processor time for a notification of streams that the process does not follow."""
        return self.idle_processor / max(1, self.idle_received)

    def rate(self, count: float) -> float:
        """Return a count for each second."""
        return count / self.seconds

    def each(self, count: float) -> float:
        """Return a count for each second and process."""
        return count / self.seconds / self.size.processes

    def per_token(self, amount: float) -> float:
        return amount / max(1, self.tokens)

    def __str__(self) -> str:
        server = "" if self.server_processor is None else f" + {self.rate(self.server_processor):.2f} of the server"
        return (
            f"{self.size}: {self.rate(self.tokens):,.0f} tokens/s ({self.reached:.0%}), p50 {self.p50:.1f} ms, "
            f"p99 {self.p99:.1f} ms, {self.most_pooled} + {self.listening} connections, each process received "
            f"{self.each(self.received):,.0f} notifications/s, {self.rate(self.processor):.2f} cores{server}, "
            f"{self.rate(sum(self.statements.values())):,.0f} statements/s"
        )


def from_json(run: dict[str, Any]) -> Run:
    """Return the run that `asdict` has converted."""
    return Run(**{**run, "size": Size(*run["size"])})
