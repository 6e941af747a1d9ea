"""A network that breaks on purpose: a TCP proxy in front of a server, in threads of the test's own process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from psycopg.conninfo import conninfo_to_dict, make_conninfo

TO_SERVER, TO_CLIENT = "to the server", "to the client"
BOTH = (TO_SERVER, TO_CLIENT)

READY_FOR_QUERY = b"Z\0\0\0\5"  # and one byte more: the end of a reply


class Proxy:
    """Passes on what comes to `dsn`, unless it is told to do otherwise. Each fault lasts until `heal`."""

    def __init__(self, target: str) -> None:
        self.lead_to(target)
        self._change = threading.Condition()
        self._links: set[_Link] = set()
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._stalled: frozenset[str] = frozenset()
        self._pause = 0.0
        self._marker: bytes | None = None
        self._answered = False
        self.faults = 0  # cuts at a marker that have taken place
        self.listened = 0  # connections that have sent LISTEN, so far
        self._listener = self._listen(0)
        self.port: int = self._listener.getsockname()[1]
        self.dsn = make_conninfo(target, host="127.0.0.1", port=self.port)
        self.refused = False

    def lead_to(self, target: str) -> None:
        """Take new connections to another server than before."""
        parameters = conninfo_to_dict(target)
        self._server = (str(parameters["host"]), int(str(parameters["port"])))

    def cut(self) -> None:
        """End all connections."""
        with self._change:
            links = list(self._links)
        for link in links:
            link.cut()

    def stall(self, *directions: str, listening_only: bool = False) -> None:
        """Accept and take everything, and pass nothing on; with `listening_only`, on connections that LISTEN now.

        What was taken arrives after `heal`, also if the one who sent it has hung up since.
        """
        with self._change:
            if listening_only:
                for link in self._links:
                    link.stalled = frozenset(directions) if link.listens else frozenset()
            else:
                self._stalled = frozenset(directions)

    def delay(self, seconds: float) -> None:
        """Hold up each piece of data, in both directions."""
        self._pause = seconds

    def refuse(self) -> None:
        """Refuse new connections."""
        self.refused = True
        self._hang_up()

    def cut_at(self, marker: str, *, answered: bool) -> None:
        """Cut the next connection whose client sends `marker`: before the server gets it, or with the reply swallowed.

        This takes place once.
        """
        with self._change:
            self._marker, self._answered = marker.encode(), answered

    def heal(self) -> None:
        """End every fault. What was held up goes on."""
        with self._change:
            self._stalled, self._pause, self._marker = frozenset(), 0.0, None
            for link in self._links:
                link.stalled = frozenset()
            self._change.notify_all()
        if self.refused:
            self.refused = False
            self._listener = self._listen(self.port)

    def close(self) -> None:
        with self._change:
            self._closed = True
            self._change.notify_all()
        if not self.refused:
            self._hang_up()
        self.cut()
        for thread in self._threads:
            thread.join()

    def _listen(self, port: int) -> socket.socket:
        listener = socket.create_server(("127.0.0.1", port))
        self._start(self._accept, listener)
        return listener

    def _hang_up(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()

    def _start(self, run: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=run, args=arguments, name="proxy", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._server)
            except OSError:  # the server is away: so is what stands for it
                client.close()
                continue
            link = _Link(client, server)
            with self._change:
                self._links.add(link)
            self._start(self._pump, link, client, server, TO_SERVER)
            self._start(self._pump, link, server, client, TO_CLIENT)
            if self._closed:
                link.cut()

    def _pump(self, link: _Link, source: socket.socket, target: socket.socket, direction: str) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                time.sleep(self._pause)
                with self._change:
                    while direction in self._stalled | link.stalled and not link.is_cut:
                        self._change.wait(0.1)
                if direction == TO_SERVER and not self._let_through(link, data):
                    break
                if link.swallows and direction == TO_CLIENT:
                    link.swallowed += data
                    if link.swallowed[-6:-1] == READY_FOR_QUERY:
                        self.faults += 1
                        break
                else:
                    target.sendall(data)
        link.cut()
        if link.released():
            with self._change:
                self._links.discard(link)

    def _let_through(self, link: _Link, data: bytes) -> bool:
        """Look at what a client sends; return False if the connection is to be cut instead."""
        with self._change:
            if not link.listens and b'LISTEN "' in data:
                link.listens = True
                self.listened += 1
            if self._marker is None or self._marker not in data:
                return True
            self._marker = None
            link.swallows = self._answered
            if not link.swallows:
                self.faults += 1
            return link.swallows


class _Link:
    """Two connections that are one: from a client, and to the server."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self._ends = (client, server)
        self._mutex = threading.Lock()
        self._users = 2
        self.is_cut = False
        self.stalled: frozenset[str] = frozenset()
        self.listens = False
        self.swallows = False
        self.swallowed = b""
        for end in self._ends:
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def cut(self) -> None:
        """End the traffic; this wakes the threads that wait for it."""
        with self._mutex:
            if not self.is_cut:
                self.is_cut = True
                for end in self._ends:
                    with suppress(OSError):
                        end.shutdown(socket.SHUT_RDWR)

    def released(self) -> bool:
        """Count one of the two threads off, and close with the last: a connection is not closed while it is in use."""
        with self._mutex:
            self._users -= 1
            if self._users == 0:
                for end in self._ends:
                    end.close()
            return self._users == 0


@contextmanager
def proxy(target: str) -> Iterator[Proxy]:
    """Start a proxy on a free port of the loopback interface, in front of the server of a connection string."""
    made = Proxy(target)
    try:
        yield made
    finally:
        made.close()


def _cut_off(network: Proxy) -> None:
    network.refuse()
    network.cut()


# What lasts until it is healed.
LASTING: dict[str, Callable[[Proxy], None]] = {
    "refused": _cut_off,
    "silent": lambda network: network.stall(*BOTH),
    "requests held up": lambda network: network.stall(TO_SERVER),
    "replies held up": lambda network: network.stall(TO_CLIENT),
}
