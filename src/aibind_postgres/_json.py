"""Compact and strict JSON. Pure."""

from __future__ import annotations

import json
from typing import Any, NoReturn


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
