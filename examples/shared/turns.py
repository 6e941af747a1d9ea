"""How the page sees a conversation: its current path, and where there are alternatives to it."""

from collections.abc import Callable
from typing import Any

from aibind_postgres import ChatHistory

# What the page may ask for, at a message: to go to another alternative, to go back to before it, so that the next
# message becomes an alternative to it, and to go there again.
ACTIONS: dict[str, Callable[[ChatHistory[Any], str], object]] = {
    "previous": ChatHistory.prev_alternative,
    "next": ChatHistory.next_alternative,
    "rewind": lambda chat, id: chat.tree.rewind(id),
    "return": lambda chat, id: chat.tree.set_active_leaf(id),
}


def shown(chat: ChatHistory[Any]) -> list[dict[str, Any]]:
    """Return what the page shows."""
    turns = []
    for id in chat.node_ids:
        alternatives, index = chat.tree.siblings(id)
        turns.append(
            {
                "id": id,
                "role": alternatives[index].message["role"],
                "content": alternatives[index].message["content"],
                "state": alternatives[index].metadata.get("state", "done"),
                "alternative": index + 1,
                "alternatives": len(alternatives),
            }
        )
    return turns


def change(chat: ChatHistory[Any], action: str, id: str) -> list[dict[str, Any]]:
    """Change the current path at a message; return what is shown then. Raises `LookupError` for what is not there."""
    ACTIONS[action](chat, id)
    return shown(chat)
