"""A conversation as lines of text. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .._json import compact_json
from .._ui_turns import ui_text
from ..history import ChatHistory
from .text_output import printable

ACTIVE, INACTIVE = "* ", "  "


def draw_messages(chat: ChatHistory[Any], width: int) -> Iterator[str]:
    """Yield a line for each message, with the messages of a branch in sequence. A star marks the current path.

    Only alternatives are indented, so that long conversations stay readable.

    Args:
        chat: The conversation.
        width: The most characters of a line, not counting the indentation.
    """
    tree = chat.tree
    active = set(chat.node_ids)
    roots = tree.root_ids
    pending = [(node_id, int(len(roots) > 1)) for node_id in reversed(roots)]
    while pending:
        node_id, level = pending.pop()
        node = tree.get(node_id)
        assert node is not None
        mark = ACTIVE if node_id in active else INACTIVE
        yield f"{mark}{'  ' * level}{shorten(printable(message_text(node.message)), width)}"
        below = level + (len(node.children) > 1)
        pending += [(child, below) for child in reversed(node.children)]


def message_text(message: Any) -> str:
    """Return the role and the text of a message, or its JSON if it has another form."""
    if isinstance(message, Mapping) and isinstance(message.get("role"), str):
        if isinstance(message.get("content"), str):
            return f"{message['role']}: {message['content']}"
        if text := ui_text(message):
            return f"{message['role']}: {text}"
    return message if isinstance(message, str) else compact_json(message)


def shorten(text: str, width: int) -> str:
    """Return a text, or its beginning with an ellipsis if it has more than `width` characters."""
    return text if len(text) <= width else f"{text[: width - 1]}…"
