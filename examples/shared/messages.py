"""The messages of a conversation as the page shows them, and the changes that the page can make."""

from collections.abc import Callable
from typing import Any

from aibind_postgres import ChatHistory

# The actions of the page on a message:
# - previous, next: switch to another alternative of the message.
# - rewind: go back to the message before it, so that the next message becomes an alternative.
# - return: undo a rewind.
ACTIONS: dict[str, Callable[[ChatHistory[Any], str], object]] = {
    "previous": ChatHistory.prev_alternative,
    "next": ChatHistory.next_alternative,
    "rewind": lambda chat, id: chat.tree.rewind(id),
    "return": lambda chat, id: chat.tree.set_active_leaf(id),
}


def current_path(chat: ChatHistory[Any]) -> list[dict[str, Any]]:
    """Return the messages of the current path, each with its state and its position among its alternatives."""
    messages = []
    for id in chat.node_ids:
        alternatives, index = chat.tree.siblings(id)
        messages.append(
            {
                "id": id,
                "role": alternatives[index].message["role"],
                "content": alternatives[index].message["content"],
                "state": alternatives[index].metadata.get("state", "done"),
                "alternative": index + 1,
                "alternatives": len(alternatives),
            }
        )
    return messages


def change(chat: ChatHistory[Any], action: str, id: str) -> list[dict[str, Any]]:
    """Run an action on a message and return the new current path.

    Raises:
        LookupError: The action or the message does not exist.
    """
    ACTIONS[action](chat, id)
    return current_path(chat)
