"""`write`: standard input becomes a stream while it comes in."""

from __future__ import annotations

import codecs
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

import psycopg

from ..errors import AibindError, StreamExistsError
from .target import DONE, FAILED, INTERRUPTED, USAGE, say

if TYPE_CHECKING:
    from .._sync.stream_store import PostgresStreamStore

_READ = 65536  # bytes at most at a time; what is there is read at once

# A chunk of each kind. The text that these are applied to ends with one, so that no search runs on in vain.
_PIECE = {"char": re.compile(".", re.DOTALL), "word": re.compile(r"\S*\s+"), "line": re.compile(r"[^\n]*\n")}


class NotTextError(Exception):
    """The input has a byte that is no part of a text that can be stored."""


def write(store: PostgresStreamStore, stream_id: str, by: str, delay: float) -> int:
    """Store standard input as a new stream and return the exit code. Once it is there, it is ended whatever happens."""
    try:
        store.create(stream_id)
    except StreamExistsError as error:
        say(f"{error}: choose another id")
        return USAGE
    try:
        for pieces in split(decode(sys.stdin.fileno()), by):
            if delay == 0:
                store.append_many(stream_id, pieces)
            else:
                for piece in pieces:
                    store.append(stream_id, piece)
                    time.sleep(delay)
    except NotTextError as error:
        store.fail(stream_id, str(error))
        say(f"{error}; what came before is stored, and the stream has ended in an error")
        return FAILED
    except KeyboardInterrupt:
        store.stop(stream_id)
        say(f"interrupted; stream {stream_id!r} is stopped")
        return INTERRUPTED
    except BaseException as error:
        with suppress(AibindError, psycopg.Error):
            store.fail(stream_id, f"the writer ended early: {type(error).__name__}")
        raise
    if store.complete(stream_id):
        return DONE
    ended = store.get_status(stream_id)
    say(f"somebody else has ended stream {stream_id!r}" + (f": its state is {ended.state!r}" if ended else ""))
    return FAILED


def decode(source: int) -> Iterator[str]:
    """Yield the text that a file descriptor gives, as soon as it is there.

    Raises `NotTextError` at the first byte that is not UTF-8 or is NUL, when all text before it has been yielded.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    bytes_read = 0
    while True:
        data = os.read(source, _READ)
        good, nul, _ = data.partition(b"\0")
        try:
            text = decoder.decode(good, final=bool(nul) or not data)
        except UnicodeDecodeError as error:
            # The decoder had kept the beginning of a character from earlier reads: it stands in front.
            yield error.object[: error.start].decode()
            place = bytes_read + len(good) - len(error.object) + error.start
            raise NotTextError(f"the input is not UTF-8: byte {place} is {error.object[error.start]:#04x}") from None
        if text:
            yield text
        if nul:
            raise NotTextError(f"the input has a NUL at byte {bytes_read + len(good)}, which PostgreSQL cannot store")
        if not data:
            return
        bytes_read += len(data)


def split(texts: Iterator[str], by: str) -> Iterator[list[str]]:
    """Yield, for each text that arrives, the whole pieces there are; at the end the rest. Together they are the text.

    A word has the white space behind it. A line ends with a line feed.
    """
    rest = ""
    try:
        for text in texts:
            rest += text
            whole = _whole(rest, by)
            if pieces := _PIECE[by].findall(rest[:whole]):
                yield pieces
            rest = rest[whole:]
    except NotTextError:
        if rest:
            yield [rest]
        raise
    if rest:
        yield [rest]


def _whole(text: str, by: str) -> int:
    """Return where the last piece of a text ends that nothing can be added to."""
    if by == "line":
        return text.rfind("\n") + 1
    if by == "word" and text and not text[-1].isspace():
        return len(text) - len(text.rsplit(maxsplit=1)[-1])
    return len(text)
