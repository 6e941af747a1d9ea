"""Wire formats: how the items of a source become chunks, and how stored chunks become bytes for a client. Pure.

Each module of this package is one wire format, and has its `WIRE`. The name of the module is stored with each stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any, Literal, Protocol, get_args

from ..errors import InvalidDataError
from ..models import StreamStatus

WireName = Literal["aibind", "ai_sdk", "ag_ui", "sse"]

NAMES: tuple[WireName, ...] = get_args(WireName)

# Common to all event streams.
EVENT_STREAM = {
    "Content-Type": "text/event-stream",
    # A compressing proxy would hold events back until it has enough to compress.
    "Cache-Control": "no-cache, no-store, no-transform",
    "X-Accel-Buffering": "no",  # keeps nginx from buffering events
}

INTERRUPTED = "the answer was interrupted"  # shown to clients if there is no better text
DELETED = "the answer was deleted"


class ChunkEncoder(Protocol):
    """Turns the items of one source into the chunks of one stream."""

    def encode(self, item: Any) -> Sequence[str]:
        """Return the chunks for an item.

        Raises:
            InvalidDataError: The item cannot be encoded.
        """

    def finish(self) -> Sequence[str]:
        """Return the last chunks, after the source has ended without an error."""


class FrameEncoder:
    """Turns the chunks of one stream into bytes for one client. The base class of those of the wire formats."""

    def begin(self) -> bytes:
        """Return the first bytes of the response that started the stream. Default: none."""
        return b""

    def frame(self, seq: int, chunk: str) -> bytes | None:
        """Return the bytes for a chunk. None if they depend on earlier chunks: call `look_back` first, then repeat."""
        raise NotImplementedError

    def look_back(self, chunk: str | None) -> bool:
        """Read one chunk from before the first one. Called for the newest of them first, until the result is True.

        Args:
            chunk: The chunk. None ends the search: there is no earlier chunk, or too many did not suffice.

        Returns:
            Whether `frame` can now encode its chunk.
        """
        return True

    def end(self, status: StreamStatus | None) -> bytes:
        """Return the last bytes.

        Args:
            status: The final status. None if the stream was deleted.
        """
        raise NotImplementedError


class Wire(Protocol):
    """A wire format.

    Attributes:
        name: The name of its module.
        headers: The headers of its responses.
    """

    @property
    def name(self) -> WireName: ...

    @property
    def headers(self) -> Mapping[str, str]: ...

    def chunk_encoder(self, stream_id: str) -> ChunkEncoder:
        """Return the encoder for a new stream. Raise `InvalidDataError` if the format cannot represent its id."""

    def frame_encoder(self, stream_id: str, after_seq: int) -> FrameEncoder:
        """Return the encoder for a client that has the chunks up to `after_seq`."""

    def text(self, chunks: Iterable[str]) -> str:
        """Return the text in chunks, without events and other parts."""


def find_wire(name: str | None) -> Wire:
    """Return the wire format with a name. None stands for `aibind`.

    Raises:
        InvalidDataError: There is no wire format with this name.
    """
    if name is None:
        name = "aibind"
    if name not in NAMES:
        raise InvalidDataError(f"unknown wire format {name!r}: it must be one of {', '.join(NAMES)}")
    wire: Wire = import_module(f".{name}", __name__).WIRE
    return wire
