"""The wire format of an event stream that another library has encoded: its frames are stored and sent unchanged. Pure.

A frame ends with an empty line, by the HTML standard (WHATWG), section 9.2, "Server-sent events".
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from ..errors import InvalidDataError
from ..models import StreamStatus
from ..sse import ServerSentEvent, encode
from . import EVENT_STREAM, INTERRUPTED, FrameEncoder, WireName

# The end of a line, and an empty line. A CR at the end of the text may be the first half of a CRLF.
_FRAME_END = re.compile(r"(?:\r\n|\n|\r(?!\n|$))(?:\r\n|\n|\r(?!\n|$))")

MAX_END = 3  # characters of an end that may have arrived without its last one


class SseWire:
    """The items are pieces of an event stream, `str` or `bytes`, split anywhere. Each frame becomes one chunk.

    PostgreSQL cannot store U+0000, so frames with it are refused.
    """

    name: WireName = "sse"
    headers: Mapping[str, str] = EVENT_STREAM

    def chunks(self, stream_id: str) -> SseChunks:
        return SseChunks()

    def frames(self, stream_id: str, after_seq: int) -> SseFrames:
        return SseFrames()

    def text(self, chunks: Iterable[str]) -> str:
        return "".join(chunks)


class SseChunks:
    """Splits an event stream into its frames."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict")
        self._parts: list[str] = []  # of the incomplete frame
        self._tail = ""  # its last characters, which may be the beginning of its end

    def encode(self, item: Any) -> Sequence[str]:
        if isinstance(item, bytes):
            text = self._decode(item)
        elif isinstance(item, str):
            text = item
        else:
            raise InvalidDataError(f"an item must be a str or bytes, not {type(item).__name__}")
        searched = self._tail + text
        self._parts.append(text)
        ends = [found.end() for found in _FRAME_END.finditer(searched)]
        if not ends:
            self._tail = searched[-MAX_END:]
            return ()
        text = "".join(self._parts)
        shift = len(text) - len(searched)
        frames = [text[start + shift * (start > 0) : end + shift] for start, end in pairwise([0, *ends])]
        self._parts = [text[ends[-1] + shift :]]
        self._tail = self._parts[0][-MAX_END:]
        return frames

    def finish(self) -> Sequence[str]:
        rest = "".join([*self._parts, self._decode(b"", final=True)])
        return (rest,) if rest else ()

    def _decode(self, received: bytes, *, final: bool = False) -> str:
        try:
            return self._decoder.decode(received, final)
        except UnicodeDecodeError as error:
            raise InvalidDataError(f"the event stream is not UTF-8: {error.reason}") from None


class SseFrames(FrameEncoder):
    """Sends each chunk unchanged. Only an error adds a frame at the end, with the name `error`."""

    def frame(self, seq: int, chunk: str) -> bytes:
        return chunk.encode()

    def end(self, status: StreamStatus | None) -> bytes:
        if status is not None and status.state == "error":
            return encode(ServerSentEvent(status.error or INTERRUPTED, "error"))
        return b""


WIRE = SseWire()
