"""Parse the beginning of a JSON text, such as the streamed input of a tool, as the AI SDK's clients do. Pure.

The clients repair a text that is not JSON: they cut it after the last valid position, and close open strings, objects
and arrays. The repair is a scanner, not a parser: it ignores unexpected characters. The repaired text is then parsed
strictly, which detects most errors. The major versions of the scanner differ in two points:

- before 7, a space or a minus sign at the beginning of an array is a valid position;
- in 5, so is each character of a `\\u` escape.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from ._json import reject_constant

ABSENT: Any = object()  # JavaScript's undefined

_LITERALS = {"t": "true", "f": "false", "n": "null"}
_PLAIN = re.compile(r'[^"\\]*')
_UNICODE_ESCAPE = re.compile(r"u(?:[^0-9A-Fa-f]*[0-9A-Fa-f]){4}")
_NUMBER = re.compile(r"[-0-9.eE]*")
_KEY = re.compile(r'"[^"]*"?')  # an escaped quote also ends a key
_KEY_OR_BRACE = re.compile(r'"[^"]*"?|\}')
_IN_ARRAY_START = re.compile(r'["tfn{\[\]0-9-]')
_VALUE_START = re.compile(r'["tfn{\[0-9-]')

# The next expected token in the innermost object or array.
_FIRST_KEY, _NEXT_KEY, _COLON, _PROPERTY, _AFTER_PROPERTY = range(5)
_FIRST_ITEM, _NEXT_ITEM, _AFTER_ITEM = range(5, 8)
_ROOT, _DONE = range(8, 10)


def parse_partial_json(text: str, sdk_version: int = 7) -> Any:
    """Return the value of a JSON text or of its beginning. `ABSENT` if it cannot be repaired."""
    value = _parse(text)
    return _parse(_repair(text, sdk_version)) if value is ABSENT else value


def _parse(text: str) -> Any:
    try:
        return json.loads(
            text, object_hook=_checked, parse_int=_integer, parse_float=_float, parse_constant=reject_constant
        )
    except (ValueError, RecursionError):
        return ABSENT


def _checked(value: dict[str, Any]) -> dict[str, Any]:
    # The clients refuse these keys, since they could change the prototypes of JavaScript's objects.
    constructor = value.get("constructor")
    if "__proto__" in value or (isinstance(constructor, dict) and "prototype" in constructor):
        raise ValueError("forbidden key")
    return value


def _integer(digits: str) -> int | float | None:
    # Python converts only a few thousand digits. JavaScript has no integers of more than 309.
    return int(digits) if len(digits) <= 300 else _float(digits)


def _float(digits: str) -> float | None:
    value = float(digits)
    return value if math.isfinite(value) else None  # JSON has no infinity


def _repair(text: str, sdk_version: int) -> str:
    """Cut a text after its last valid position, and close its open string, literal, objects and arrays."""
    stack = [_ROOT]
    length = len(text)
    end = 0  # of the valid part
    position = 0
    open_value = ""  # completes the string or literal at the end of the text
    while position < length and not open_value:
        state = stack[-1]
        character = text[position]
        if state == _DONE:
            break
        if state in (_FIRST_KEY, _NEXT_KEY):
            start = (_KEY_OR_BRACE if state == _FIRST_KEY else _KEY).search(text, position)
            if not start:
                break
            position = start.end()
            if start[0] == "}":
                stack.pop()
                end = position
            else:
                stack[-1] = _COLON
            continue
        if state == _COLON:
            position = text.find(":", position) + 1
            if not position:
                break
            stack[-1] = _PROPERTY
            continue
        if state in (_AFTER_PROPERTY, _AFTER_ITEM):
            end = _end_value(stack, character, position, end)
            if state == _AFTER_ITEM and character != ",":
                end = position + 1
            position += 1
            continue

        # A value, or the end of an empty array.
        start = (_IN_ARRAY_START if state == _FIRST_ITEM else _VALUE_START).search(text, position)
        if state == _FIRST_ITEM and sdk_version < 7:
            end = start.start() + 1 if start else length
        if not start:
            break
        position = start.start()
        character = text[position]
        if character == "]":
            stack.pop()
            end = position = position + 1
            continue
        stack[-1] = _DONE if state == _ROOT else _AFTER_ITEM if state in (_FIRST_ITEM, _NEXT_ITEM) else _AFTER_PROPERTY
        if character != "-":
            end = position + 1
        if character in "{[":
            stack.append(_FIRST_KEY if character == "{" else _FIRST_ITEM)
            position += 1
        elif character == '"':
            position, end, closed = _scan_string(text, position + 1, sdk_version)
            open_value = "" if closed else '"'
        elif character in _LITERALS:
            literal = _LITERALS[character]
            matching = 1
            while matching < len(literal) and text[position + matching : position + matching + 1] == literal[matching]:
                matching += 1
            position = end = position + matching
            if position == length:
                open_value = literal[matching:]
                break
            end = _end_value(stack, text[position], position, end)
            position += 1
        else:
            match = _NUMBER.match(text, position)
            assert match is not None  # the pattern also matches nothing
            digits = len(match[0].rstrip("-.eE"))
            end = position + digits if digits else end
            position = match.end()
            if position < length:
                # A brace after a number in an array is skipped, and so is a bracket in an object.
                end = _end_value(stack, text[position], position, end)
                position += 1
    closers = ("]" if _FIRST_ITEM <= state <= _AFTER_ITEM else "}" for state in reversed(stack) if state < _ROOT)
    return text[:end] + open_value + "".join(closers)


def _end_value(stack: list[int], character: str, position: int, end: int) -> int:
    """Take the character after a value in an object or array. Return the end of the valid part."""
    after_property = stack[-1] == _AFTER_PROPERTY
    if not after_property and stack[-1] != _AFTER_ITEM:
        return end
    if character == ",":
        stack[-1] = _NEXT_KEY if after_property else _NEXT_ITEM
    elif character == ("}" if after_property else "]"):
        stack.pop()
        return position + 1
    return end


def _scan_string(text: str, position: int, sdk_version: int) -> tuple[int, int, bool]:
    """Scan a string from the character after its quote.

    Returns:
        The position behind it, the end of its valid part, and whether it is closed.
    """
    while True:
        match = _PLAIN.match(text, position)
        assert match is not None  # the pattern also matches nothing
        position = end = match.end()
        if text[position : position + 1] == '"':
            return position + 1, position + 1, True
        position += 1  # the backslash
        if position >= len(text):
            return position, end, False
        if text[position] == "u" and sdk_version > 5:
            escape = _UNICODE_ESCAPE.match(text, position)
            if escape is None:
                return len(text), end, False
            position = escape.end()
        else:
            position += 1
