"""How the page sees a conversation: its current path, and where there are alternatives to it."""

from typing import Any

from aibind_postgres import ChatHistory

from .model import SYSTEM


def shown(chat: ChatHistory[Any]) -> list[dict[str, Any]]:
    """Return what the page shows; a new conversation begins with what the model is told, which the page leaves out."""
    if chat.is_empty:
        chat.append(SYSTEM)
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


def _branch(chat: ChatHistory[Any], id: str) -> None:
    """Go back to before a message, so that the next one becomes an alternative to it."""
    path = chat.tree.path_to(id).node_ids
    chat.tree.set_active_leaf(path[-2])


ACTIONS = {
    "previous": ChatHistory.prev_alternative,
    "next": ChatHistory.next_alternative,
    "branch": _branch,
}
