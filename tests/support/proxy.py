"""A TCP proxy that simulates network faults. It runs in threads of the test's process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from psycopg.conninfo import conninfo_to_dict, make_conninfo

TO_SERVER, TO_CLIENT = "to the server", "to the client"
BOTH = (TO_SERVER, TO_CLIENT)

READY_FOR_QUERY = b"Z\0\0\0\5"  # followed by one status byte at the end of a reply


class Proxy:
    """Forwards connections from `dsn` to a server. Each fault lasts until `heal`.

    Attributes:
        dsn: The connection string that leads through the proxy.
        port: The port of the proxy.
        faults: The number of cuts at a marker so far.
        listened: The number of connections that have sent LISTEN so far.
        refused: Whether the proxy refuses connections.
    """

    def __init__(self, target: str) -> None:
        self.redirect(target)
        self._change = threading.Condition()
        self._links: set[_Link] = set()
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._stalled: frozenset[str] = frozenset()
        self._pause = 0.0
        self._marker: bytes | None = None
        self._answered = False
        self.faults = 0
        self.listened = 0
        self._listener = self._listen(0)
        self.port: int = self._listener.getsockname()[1]
        self.dsn = make_conninfo(target, host="127.0.0.1", port=self.port)
        self.refused = False

    def redirect(self, target: str) -> None:
        """Forward new connections to the server of another connection string."""
        parameters = conninfo_to_dict(target)
        self._server = (str(parameters["host"]), int(str(parameters["port"])))

    def cut(self) -> None:
        """End all connections."""
        with self._change:
            links = list(self._links)
        for link in links:
            link.cut()

    def stall(self, *directions: str, listening_only: bool = False, connected_only: bool = False) -> None:
        """Accept connections and data, but forward nothing in these directions.

        Held data is delivered after `heal`, even if its sender has disconnected. With `listening_only`, stall only the
        connections that have sent LISTEN before this call. With `connected_only`, stall all connections that exist.
        """
        with self._change:
            if listening_only or connected_only:
                for link in self._links:
                    link.stalled = frozenset(directions) if link.listens or connected_only else frozenset()
            else:
                self._stalled = frozenset(directions)

    def delay(self, seconds: float) -> None:
        """Delay each piece of data in both directions."""
        self._pause = seconds

    def refuse(self) -> None:
        """Refuse new connections."""
        self.refused = True
        self._stop_listening()

    def cut_at(self, marker: str, *, answered: bool) -> None:
        """Cut the next connection whose client sends `marker`, once.

        With `answered`, cut it after the server has replied, and drop the reply. Otherwise the server never receives
        the marker.
        """
        with self._change:
            self._marker, self._answered = marker.encode(), answered

    def heal(self) -> None:
        """End every fault and deliver held data."""
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
            self._stop_listening()
        self.cut()
        for thread in self._threads:
            thread.join()

    def _listen(self, port: int) -> socket.socket:
        listener = socket.create_server(("127.0.0.1", port))
        self._start(self._accept, listener)
        return listener

    def _stop_listening(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the accepting thread
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
            except OSError:  # the server is down, so the proxy refuses the client
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
                if direction == TO_SERVER and not self._inspect(link, data):
                    break
                if link.drops_reply and direction == TO_CLIENT:
                    link.dropped += data
                    if link.dropped[-6:-1] == READY_FOR_QUERY:
                        self.faults += 1
                        break
                else:
                    target.sendall(data)
        link.cut()
        if link.release():
            with self._change:
                self._links.discard(link)

    def _inspect(self, link: _Link, data: bytes) -> bool:
        """Look for LISTEN and the marker in a client's data. Return False if the connection must be cut."""
        with self._change:
            if not link.listens and b'LISTEN "' in data:
                link.listens = True
                self.listened += 1
            if self._marker is None or self._marker not in data:
                return True
            self._marker = None
            link.drops_reply = self._answered
            if not link.drops_reply:
                self.faults += 1
            return link.drops_reply


class _Link:
    """A client's connection to the proxy and the matching connection to the server."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self._ends = (client, server)
        self._mutex = threading.Lock()
        self._users = 2
        self.is_cut = False
        self.stalled: frozenset[str] = frozenset()
        self.listens = False
        self.drops_reply = False
        self.dropped = b""
        for end in self._ends:
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def cut(self) -> None:
        """Shut both connections down, which wakes the threads that read from them."""
        with self._mutex:
            if not self.is_cut:
                self.is_cut = True
                for end in self._ends:
                    with suppress(OSError):
                        end.shutdown(socket.SHUT_RDWR)

    def release(self) -> bool:
        """Release the link for one of its two threads. The last one closes both connections and gets True."""
        with self._mutex:
            self._users -= 1
            if self._users == 0:
                for end in self._ends:
                    end.close()
            return self._users == 0


@contextmanager
def proxy(target: str) -> Iterator[Proxy]:
    """Start a proxy for the server of a connection string, on a free port of the loopback interface."""
    result = Proxy(target)
    try:
        yield result
    finally:
        result.close()


def _refuse_and_cut(network: Proxy) -> None:
    network.refuse()
    network.cut()


# Faults that last until `heal`.
LASTING: dict[str, Callable[[Proxy], None]] = {
    "refused": _refuse_and_cut,
    "silent": lambda network: network.stall(*BOTH),
    "requests stalled": lambda network: network.stall(TO_SERVER),
    "replies stalled": lambda network: network.stall(TO_CLIENT),
}
