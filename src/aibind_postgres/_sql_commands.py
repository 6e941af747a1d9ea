"""Split SQL into its commands. Pure."""

from __future__ import annotations

import re

# Quoted text may contain semicolons and dashes, so it is matched before them.
_TOKENS = re.compile(
    r"""(?P<comment>--[^\n]*)
    | (?P<end>;)
    | "(?:[^"]|"")*"
    | \b[Ee]'(?:[^'\\]|\\.|'')*'
    | '(?:[^']|'')*'
    | (?P<tag>\$(?:[^\W\d]\w*)?\$).*?(?P=tag)""",
    re.DOTALL | re.VERBOSE,
)


def split_commands(sql: str) -> list[str]:
    """Return the commands of an SQL text, without semicolons and without the comments between and inside them.

    Comments in a dollar-quoted text, such as the body of a function, are part of the text.
    """
    pieces: list[str] = []
    commands: list[str] = []
    end = 0
    for token in _TOKENS.finditer(sql):
        if token["comment"] is None and token["end"] is None:
            continue
        pieces.append(sql[end : token.start()])
        end = token.end()
        if token["end"] is not None:
            commands.append("".join(pieces).strip())
            pieces.clear()
    commands.append("".join([*pieces, sql[end:]]).strip())
    return [command for command in commands if command]
