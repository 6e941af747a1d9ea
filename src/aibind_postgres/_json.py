"""JSON texts: compact, strict, and for clients that may get them in parts. Pure."""

from __future__ import annotations

import codecs
import json
from typing import Any, NoReturn

from .errors import InvalidDataError


def reject_constant(name: str) -> NoReturn:
    """Raise `ValueError` for `NaN` and `Infinity`. The argument `parse_constant` of `json.loads`."""
    raise ValueError(f"{name} is not JSON")


def compact_json(value: Any) -> str:
    """Return a value as JSON without spaces. Raise `TypeError`, `ValueError` or `RecursionError` if it is not JSON.

    A lone surrogate is escaped: a model may split its texts within a character, and clients join them.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text


def parse_object(text: str) -> dict[str, Any]:
    """Return the JSON object of a text. Another text, such as other code may have stored, gives an empty dict."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


class Utf8Decoder:
    """Decodes a text in UTF-8 that arrives in pieces, which may split characters."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict")

    def decode(self, received: bytes, *, final: bool = False) -> str:
        """Return the text that a piece completes. Raise `InvalidDataError` if it is not UTF-8."""
        try:
            return self._decoder.decode(received, final)
        except UnicodeDecodeError as error:
            raise InvalidDataError(f"the event stream is not UTF-8: {error.reason}") from None
