"""`tail`, `replay` and `status`. Standard output gets the exact text of the stream; messages go to standard error."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, Literal, TypeAlias

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from .._tables import CHUNKS_TABLE, STATUS_TABLE
from ..errors import StreamNotFoundError
from ..models import StoredEvent, event_of
from ..wire import Wire, find_wire
from .target import DONE, FAILED, INTERRUPTED, Target, print_message

if TYPE_CHECKING:
    from .._sync.stream_store import PostgresStreamStore

OutputFormat: TypeAlias = Literal["text", "raw", "events"]

_SECRETS = ("password", "sslpassword", "oauth_client_secret")


class _DeferredInterrupt:
    """Context manager that delays Ctrl-C until its block ends.

    `tail` prints and counts a chunk in one block, so that the position to resume from is exact. A second Ctrl-C
    interrupts at once, in case the output is blocked.
    """

    def __init__(self) -> None:
        self._protected = False
        self._pending = False
        signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._protected or self._pending:
            raise KeyboardInterrupt
        self._pending = True

    def __enter__(self) -> None:
        self._protected = True

    def __exit__(self, *_: object) -> None:
        self._protected = False
        if self._pending:
            raise KeyboardInterrupt


def render(seq: int, data: str, output_format: OutputFormat, wire: Wire) -> str:
    """Return the output for a chunk. For an event without a text it is empty in the format `text`."""
    if output_format == "raw":
        return data
    if output_format == "events":
        return json.dumps(StoredEvent(seq, *event_of(data))._asdict(), ensure_ascii=False) + "\n"
    return wire.text([data])


def _wire_of(store: PostgresStreamStore, stream_id: str) -> Wire:
    info = store.get_info(stream_id)
    if info is None:
        raise StreamNotFoundError(stream_id)
    return find_wire(info.wire)


def tail(store: PostgresStreamStore, stream_id: str, after: int, output_format: OutputFormat, target: Target) -> int:
    """Print chunks as they arrive. Return the exit code for the final state of the stream."""
    wire = _wire_of(store, stream_id)
    deferred_interrupt = _DeferredInterrupt()
    last = ""
    try:
        for seq, data in store.read_from(stream_id, after):
            output = render(seq, data, output_format, wire)
            with deferred_interrupt:
                sys.stdout.buffer.write(output.encode())
                sys.stdout.buffer.flush()
                after, last = seq, output or last
        _finish_line(last)
        return _report_state(store, stream_id)
    except KeyboardInterrupt:
        _finish_line(last)
        print_message(f"interrupted; to resume from here: {_resume_command(stream_id, after, output_format, target)}")
        return INTERRUPTED


def replay(
    store: PostgresStreamStore, stream_id: str, after: int, output_format: OutputFormat, speed: float | None
) -> int:
    """Print the stored chunks, without pauses if `speed` is None. Return the exit code for the state of the stream."""
    wire = _wire_of(store, stream_id)
    last = ""
    if speed is None:
        chunks = store.read_from(stream_id, after, follow=False)
    else:
        chunks = store.replay(stream_id, after, speed=speed)
    for seq, data in chunks:
        output = render(seq, data, output_format, wire)
        sys.stdout.buffer.write(output.encode())
        if speed is not None:
            sys.stdout.buffer.flush()
        last = output or last
    sys.stdout.buffer.flush()
    _finish_line(last)
    return _report_state(store, stream_id)


def status(store: PostgresStreamStore, stream_id: str) -> int:
    """Print the state of a stream and return the exit code for it."""
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
    # On a terminal, the next message starts on a new line.
    if last and not last.endswith("\n") and sys.stdout.isatty() and sys.stderr.isatty():
        print(file=sys.stderr)


def _report_state(store: PostgresStreamStore, stream_id: str) -> int:
    found = store.get_status(stream_id)
    if found is None:
        raise StreamNotFoundError(stream_id)
    match found.state:
        case "done":
            return DONE
        case "active":
            print_message(f"stream {stream_id!r} is still being written: this is its text so far")
            return DONE
        case "stopped":
            print_message(f"stream {stream_id!r} was stopped")
        case "error":
            print_message(f"stream {stream_id!r} ended in an error: {found.error}")
    return FAILED


def _resume_command(stream_id: str, after: int, output_format: OutputFormat, target: Target) -> str:
    """Return the command that resumes after chunk number `after`, without secrets."""
    options = ["--after", str(after), *([] if output_format == "text" else [f"--{output_format}"])]
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
            note = " (without the password: set the variable PGPASSWORD)"
    words = [*options, "--", stream_id] if stream_id.startswith("-") else [stream_id, *options]
    return shlex.join(["aibind-postgres", "tail", *words]) + note
