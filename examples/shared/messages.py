"""The messages of a conversation as the page shows them, and the changes that the page can make."""

from collections.abc import Callable
from typing import Any

from aibind_postgres import ChatHistory, MessageNotFoundError, StreamStatus

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


def up_to_question(chat: ChatHistory[Any], id: str) -> tuple[list[dict[str, Any]], int]:
    """Return the messages up to a question, and the number of its answers.

    Raises:
        LookupError: The conversation has no question with this id.
    """
    node = chat.tree.get(id)
    if node is None or node.message["role"] != "user":
        raise MessageNotFoundError(id)
    return chat.tree.path_to(id).messages, len(node.children)


def add_answer(chat: ChatHistory[Any], id: str, text: str, status: StreamStatus | None) -> None:
    """Add another answer to a question, with the state of its stream, unless it is empty or the question was deleted.

    The arguments `text` and `status` are those of `on_finish`.
    """
    state = "deleted" if status is None else status.state
    if id in chat.tree and (text or state == "done"):
        metadata = None if state == "done" else {"state": state}
        chat.tree.branch(id, {"role": "assistant", "content": text}, metadata)
