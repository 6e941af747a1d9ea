"""Finds calls in SQL of functions that may not be IMMUTABLE, in the places where Citus refuses them."""

from __future__ import annotations

import re

# Functions that are IMMUTABLE for all types of arguments.
IMMUTABLE = {"chr", "json_array_length", "lag", "max", "octet_length", "sum"}

# Words that may precede a parenthesis, but are no functions. greatest and least call comparisons only.
KEYWORDS = {"and", "any", "array", "as", "case", "coalesce", "conflict", "else", "exists", "from", "greatest", "in"}
KEYWORDS |= {"least", "not", "on", "or", "over", "select", "then", "values", "when", "where"}

# Words without a parenthesis that are not IMMUTABLE. Times plus intervals depend on the time zone.
MUTABLE_WORDS = {"current_date", "current_time", "current_timestamp", "interval", "localtime", "localtimestamp"}

IMMUTABLE_CASTS = {"bigint", "float8", "integer", "json", "jsonb", "text"}

TOKEN = re.compile(
    r"""'(?:[^']|'')*' | "(?:[^"]|"")*" | \$\d+ | (?P<word>[a-z_]\w*) | :: | \S""",
    re.VERBOSE | re.IGNORECASE,
)


def mutable_calls(sql: str) -> list[str]:
    """Return the calls and casts in CASE, COALESCE, RETURNING and ON CONFLICT that may not be IMMUTABLE.

    Unknown functions and casts count as not IMMUTABLE.
    """
    tokens = ["", *(match.group().lower() if match["word"] else match.group() for match in TOKEN.finditer(sql)), "", ""]
    places: list[str] = []  # the enclosing parentheses, and the enclosing places with restrictions
    found = []
    for before, token, after in zip(tokens, tokens[1:], tokens[2:], strict=False):
        if token == "(":
            places.append("coalesce" if before == "coalesce" else "(")
        elif token == ")":
            while places.pop() not in ("(", "coalesce"):
                pass
        elif token == "case":
            places.append(token)
        elif token == "end" and places[-1:] == ["case"]:
            places.pop()
        elif token == "returning" or (token == "on" and after == "conflict"):
            places.append(token)
        elif set(places) == {"("} or not places:
            continue
        elif token == "::":
            if after not in IMMUTABLE_CASTS and not before.startswith("$"):  # the cast of a parameter states its type
                found.append(f"::{after}")
        elif token in MUTABLE_WORDS or (after == "(" and token[:1].isalpha() and token not in KEYWORDS | IMMUTABLE):
            found.append(token)
    return found
