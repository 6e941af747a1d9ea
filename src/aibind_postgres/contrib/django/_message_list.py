"""The messages of a conversation as a list for the admin. Pure."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from ...history import MessageTree

MAX_LINES = 2000


class MessageLine(NamedTuple):
    """A message.

    Attributes:
        role: The role of the message, or "".
        text: Its text. A message without a text is shown as JSON.
        indent: The number of branches above it.
        branch: "2 of 3" for the second of three alternatives, or "".
        is_current: Whether it is on the current path.
        created_at: The time of creation as ISO 8601 text, or "".
    """

    role: str
    text: str
    indent: int
    branch: str
    is_current: bool
    created_at: str


def message_lines(tree: MessageTree[Any]) -> list[MessageLine]:
    """Return the messages of a tree, each alternative followed by what comes after it. At most `MAX_LINES`."""
    current = set(tree.active_path.node_ids)
    lines: list[MessageLine] = []
    pending = _siblings(tree.root_ids, 0)
    while pending and len(lines) < MAX_LINES:
        node_id, indent, branch = pending.pop()
        node = tree.get(node_id)
        if node is None:
            continue
        role, text = _read(node.message)
        lines.append(MessageLine(role, text, indent, branch, node_id in current, node.created_at))
        pending += _siblings(node.children, indent)
    return lines


def _siblings(node_ids: tuple[str, ...], indent: int) -> list[tuple[str, int, str]]:
    """Return the alternatives with their indentations and labels, the first one last."""
    if len(node_ids) == 1:
        return [(node_ids[0], indent, "")]
    labelled = [(each, indent + 1, f"{number} of {len(node_ids)}") for number, each in enumerate(node_ids, start=1)]
    return labelled[::-1]


def _read(message: Any) -> tuple[str, str]:
    """Return the role and the text of a message."""
    if not isinstance(message, dict):
        return "", message if isinstance(message, str) else json.dumps(message, ensure_ascii=False)
    role = message.get("role")
    content = message.get("content", message.get("parts"))
    if isinstance(content, list):  # such as the parts of a UIMessage
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "\n".join(text for text in texts if isinstance(text, str))
    if not isinstance(content, str) or not content:
        content = json.dumps(message, ensure_ascii=False, indent=2)
    return role if isinstance(role, str) else "", content
