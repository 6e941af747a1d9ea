"""Conversations with branches: chat operations on a message tree. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

from ._document import Document, parse_document, serialize_document, utc_timestamp
from ._message_tree import MessageTree, TreeNode, TreePath, new_id
from .errors import MessageNotFoundError

__all__ = ["ChatHistory", "MessageTree", "Origin", "TreeNode", "TreePath", "new_id"]

M = TypeVar("M")


class Origin(NamedTuple):
    """The stored row that a history was loaded from or saved to.

    Attributes:
        store: The id of the store object.
        session_id: The id of the conversation.
        base: The base of a merge: the document of the row when it was last known to equal the history. None for no row.
        digests: The digests of all texts that the row may contain if no other writer has changed it: the digest of
            `base`, then those of saves with an unknown outcome. The last one is the most likely.
        created: The time at which the row was created, as text. None for no row, or without migration 0004.
        owner: The owner of the row when it was loaded. None for no owner, no row, or without migration 0004.
    """

    store: str
    session_id: str
    base: Document | None
    digests: tuple[str | None, ...]
    created: str | None = None
    owner: str | None = None

    def with_sent(self, digest: str) -> Origin:
        """Return the origin after a text with this digest was sent and the outcome is unknown."""
        return self._replace(digests=(*(known for known in self.digests if known != digest), digest))


class ChatHistory(Generic[M]):
    """A conversation with branches: the current messages and their alternatives.

    Messages, ids, copies, errors and thread safety are those of `MessageTree`.

    Args:
        generate_id: Returns the ids of new messages; UUIDs of version 7 by default. The ids must be unique among all
            writers of the conversation.

    Attributes:
        tree: The `MessageTree`, for operations beyond those of a chat.

    Example:
        >>> chat = ChatHistory(generate_id=iter("abc").__next__)
        >>> question = chat.append({"role": "user", "content": "What is 2 + 2?"})
        >>> answer = chat.append({"role": "assistant", "content": "5"})
        >>> better = chat.regenerate(answer, {"role": "assistant", "content": "4"})
        >>> chat.messages[-1], chat.alternative_count(better)
        ({'role': 'assistant', 'content': '4'}, 2)
    """

    def __init__(self, *, generate_id: Callable[[], str] | None = None) -> None:
        self.tree: MessageTree[M] = MessageTree(generate_id=generate_id)
        self._origin: Origin | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self)} messages, active leaf {self.tree.active_leaf_id!r}>"

    def __len__(self) -> int:
        """Return the number of messages in all branches."""
        return len(self.tree)

    @property
    def messages(self) -> list[M]:
        """The messages of the current path, in order."""
        return self.tree.active_path.messages

    @property
    def node_ids(self) -> list[str]:
        """The ids of the messages of the current path, in order."""
        return self.tree.active_path.node_ids

    @property
    def is_empty(self) -> bool:
        """Whether there are no messages in any branch."""
        return self.tree.is_empty

    def append(self, message: M, metadata: Mapping[str, Any] | None = None) -> str:
        """Add a message at the end of the current path.

        Args:
            message: Any JSON value.
            metadata: A dict of JSON values to store with the message; empty by default.

        Returns:
            The id of the new message.

        Raises:
            InvalidDataError: JSON cannot represent the message or the metadata, or `generate_id` returned an invalid
                id.
        """
        return self.tree.append(message, metadata)

    def edit(self, id: str, message: M) -> str:
        """Add an alternative to a message, and make it the end of the current path.

        Args:
            id: The id of the message to replace. It stays in the tree.
            message: The alternative: any JSON value.

        Returns:
            The id of the new message.

        Raises:
            MessageNotFoundError: There is no message with this id.
            InvalidDataError: JSON cannot represent the message, or `generate_id` returned an invalid id.
        """
        node = self.tree.get(id)
        if node is None:
            raise MessageNotFoundError(id)
        return self.tree.add_root(message) if node.parent_id is None else self.tree.branch(node.parent_id, message)

    def regenerate(self, id: str, message: M) -> str:
        """Add an alternative to an answer. The same as `edit`."""
        return self.edit(id, message)

    def has_alternatives(self, id: str) -> bool:
        """Return whether a message has alternatives.

        Args:
            id: The id of the message.

        Raises:
            MessageNotFoundError: There is no message with this id.
        """
        return self.alternative_count(id) > 1

    def alternative_count(self, id: str) -> int:
        """Return the number of alternatives, including the message itself.

        Args:
            id: The id of the message.

        Raises:
            MessageNotFoundError: There is no message with this id.
        """
        return len(self.tree._sibling_ids(id))

    def alternative_index(self, id: str) -> int:
        """Return the index of a message among its alternatives, from 0.

        Args:
            id: The id of the message.

        Raises:
            MessageNotFoundError: There is no message with this id.
        """
        return self.tree._sibling_ids(id).index(id)

    def next_alternative(self, id: str) -> str | None:
        """Switch the current path to the next alternative of a message.

        The path continues from the alternative through first children down to a leaf.

        Args:
            id: The id of the message.

        Returns:
            The id of that leaf, or None if there is no next alternative; then nothing changes.

        Raises:
            MessageNotFoundError: There is no message with this id.
        """
        return self.tree.next_sibling(id)

    def prev_alternative(self, id: str) -> str | None:
        """Switch the current path to the previous alternative of a message, in the same way as `next_alternative`.

        Args:
            id: The id of the message.

        Returns:
            The id of the leaf, or None if there is no previous alternative; then nothing changes.

        Raises:
            MessageNotFoundError: There is no message with this id.
        """
        return self.tree.prev_sibling(id)

    def compact(self, summary: M) -> str:
        """Replace all messages in all branches with a summary.

        Args:
            summary: The message that remains: any JSON value.

        Returns:
            The id of the summary.

        Raises:
            InvalidDataError: JSON cannot represent the summary, or `generate_id` returned an invalid id; then
                nothing is removed.
        """
        node_id = self.tree.add_root(summary, {"compacted": True, "compactedAt": utc_timestamp()})
        self.tree._keep_only(node_id)
        return node_id

    def to_json(self) -> str:
        """Return the conversation as JSON text, which the TypeScript package can read. Equal trees give equal texts."""
        return serialize_document(self.tree._document)

    @classmethod
    def from_json(cls, text: str, *, generate_id: Callable[[], str] | None = None) -> ChatHistory[M]:
        """Create a history from the text of a document.

        Args:
            text: The text, as returned by `to_json`.
            generate_id: As for the constructor.

        Returns:
            The history.

        Raises:
            InvalidHistoryError: The text is not a valid document.
        """
        chat = cls(generate_id=generate_id)
        chat.tree._document = parse_document(text)
        return chat
