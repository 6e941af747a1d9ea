"""Event streams that another library has encoded, in pieces that may be split anywhere. Pure."""

from __future__ import annotations

import codecs

from .errors import InvalidDataError
from .sse import EventParser


class Utf8Decoder:
    """Decodes a text in UTF-8 whose pieces may split characters."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict")

    def decode(self, received: bytes, *, final: bool = False) -> str:
        """Return the text that a piece completes. Raise `InvalidDataError` if it is not UTF-8."""
        try:
            return self._decoder.decode(received, final)
        except UnicodeDecodeError as error:
            raise InvalidDataError(f"the event stream is not UTF-8: {error.reason}") from None


class EncodedEvents:
    """Returns the data of the events in an encoded event stream."""

    def __init__(self) -> None:
        self._decoder = Utf8Decoder()
        self._parser = EventParser()
        self._has_text = self._has_events = False  # whether there was any text, and an event in it
        self._is_between = True  # whether the text so far ends with a complete event

    def feed(self, piece: str | bytes) -> list[str]:
        """Return the data of the events that a piece completes. Raise `InvalidDataError` if it is not a text."""
        text = piece if isinstance(piece, str) else self._decoder.decode(piece)
        self._has_text = self._has_text or bool(text.strip())
        found = self._parse(text)
        self._has_events = self._has_events or bool(found)
        return found

    def finish(self) -> list[str]:
        """Return the data of the last event, whose empty line may be missing.

        Raises:
            InvalidDataError: The text contains no event, so that it would be lost, or ends within a character.
        """
        self._decoder.decode(b"", final=True)
        rest = [] if self._is_between else self._parse("\n\n")
        if self._has_text and not (self._has_events or rest):
            raise InvalidDataError("the encoded items contain no event: they must be an event stream, not texts")
        return rest

    def _parse(self, text: str) -> list[str]:
        if self._is_between and text.startswith("data: ") and text.endswith("\n\n"):  # usually, an item is one event
            data = text[6:-2]
            if "\n" not in data and "\r" not in data:
                return [data]
        if text:
            self._is_between = text.endswith(("\n\n", "\r\n\r\n"))
        try:
            return [event.data for event in self._parser.feed(text.encode())]
        except UnicodeEncodeError:
            raise InvalidDataError("an encoded event contains a lone surrogate, which is not a character") from None
