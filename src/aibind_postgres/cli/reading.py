"""`tail`, `replay` and `status`: what is stored, to the byte, on standard output; everything else on standard error."""

from __future__ import annotations

import shlex
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from .._tables import CHUNKS_TABLE, STATUS_TABLE
from ..errors import StreamNotFoundError
from .target import DONE, FAILED, INTERRUPTED, Target, say

if TYPE_CHECKING:
    from .._sync.stream_store import PostgresStreamStore

_SECRETS = ("password", "sslpassword", "oauth_client_secret")


class _Interruption:
    """Ctrl-C that never comes between printing a chunk and counting it: the place to resume at is exact.

    As a context manager it protects its body: an interruption takes effect behind it. A second Ctrl-C gets through, for
    an output that nobody reads.
    """

    def __init__(self) -> None:
        self._protected = False
        self._pending = False
        signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if not self._protected or self._pending:
            raise KeyboardInterrupt
        self._pending = True

    def __enter__(self) -> None:
        self._protected = True

    def __exit__(self, *_: object) -> None:
        self._protected = False
        if self._pending:
            raise KeyboardInterrupt


def tail(store: PostgresStreamStore, stream_id: str, after: int, target: Target) -> int:
    """Print the chunks as they arrive, and return the exit code that says how the stream ended."""
    interruption = _Interruption()
    last = ""
    try:
        for seq, last in store.read_from(stream_id, after):
            with interruption:
                sys.stdout.buffer.write(last.encode())
                sys.stdout.buffer.flush()
                after = seq
        _finish_line(last)
        return _how_it_ended(store, stream_id)
    except KeyboardInterrupt:
        _finish_line(last)
        say(f"interrupted; this goes on from here: {_resume(stream_id, after, target)}")
        return INTERRUPTED


def replay(store: PostgresStreamStore, stream_id: str, after: int, speed: float | None) -> int:
    """Print what is there, without pauses if there is no `speed`, and return the exit code for the stream's state."""
    last = ""
    if speed is None:
        for _, last in store.read_from(stream_id, after, follow=False):
            sys.stdout.buffer.write(last.encode())
        sys.stdout.buffer.flush()
    else:
        for _, last in store.replay(stream_id, after, speed=speed):
            sys.stdout.buffer.write(last.encode())
            sys.stdout.buffer.flush()
    _finish_line(last)
    return _how_it_ended(store, stream_id)


def status(store: PostgresStreamStore, stream_id: str) -> int:
    """Print where a stream stands, and return the exit code for it."""
    found = store.get_status(stream_id)
    if found is None:
        raise StreamNotFoundError(stream_id)
    print(f"state:  {found.state}")
    print(f"chunks: {found.total_chunks}")
    if found.error is not None:
        print(f"error:  {found.error}")
    sys.stdout.flush()
    return DONE if found.state in ("active", "done") else FAILED


def _finish_line(last: str) -> None:
    # On a screen, what is said next begins a line of its own.
    if last and not last.endswith("\n") and sys.stdout.isatty() and sys.stderr.isatty():
        print(file=sys.stderr)


def _how_it_ended(store: PostgresStreamStore, stream_id: str) -> int:
    found = store.get_status(stream_id)
    if found is None:
        raise StreamNotFoundError(stream_id)
    match found.state:
        case "done":
            return DONE
        case "active":
            say(f"stream {stream_id!r} is still being written: this is what there is so far")
            return DONE
        case "stopped":
            say(f"stream {stream_id!r} was stopped")
        case "error":
            say(f"stream {stream_id!r} ended in an error: {found.error}")
    return FAILED


def _resume(stream_id: str, after: int, target: Target) -> str:
    """Return the command that goes on behind chunk number `after`, without any secret in it."""
    options = ["--after", str(after)]
    if target.chunks_table != CHUNKS_TABLE:
        options += ["--chunks-table", target.chunks_table]
    if target.status_table != STATUS_TABLE:
        options += ["--status-table", target.status_table]
    note = ""
    if target.dsn:
        parameters = conninfo_to_dict(target.dsn)
        if parameters.keys().isdisjoint(_SECRETS):
            options += ["--dsn", target.dsn]
        else:
            public = {name: value for name, value in parameters.items() if name not in _SECRETS}
            options += ["--dsn", make_conninfo("", **public)]
            note = " (the password is left out: give it in the variable PGPASSWORD)"
    words = [*options, "--", stream_id] if stream_id.startswith("-") else [stream_id, *options]
    return shlex.join(["aibind-postgres", "tail", *words]) + note
