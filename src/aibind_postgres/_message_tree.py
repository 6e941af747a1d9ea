"""A tree of messages with one current path. Pure.

The tree stores its nodes in the document format of @aibind/core, and preserves unknown fields.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import urandom
from time import time_ns
from typing import Any, Generic, TypeVar

from ._document import MAX_DEPTH, Document, copy_json, empty_document, utc_timestamp, validate_document
from .errors import InvalidDataError, MessageNotFoundError

M = TypeVar("M")


def new_id() -> str:
    """Return a UUID of version 7 as text. It cannot be guessed: 74 of its bits are random.

    It begins with the time in milliseconds, so that partitions by time contain the streams of one day.
    """
    # Not `uuid7` of Python 3.14: it counts within a millisecond, so that the next id could be guessed from the last.
    random = int.from_bytes(urandom(10), "big")
    value = (time_ns() // 1_000_000) << 80 | 7 << 76 | (random >> 62 & 0xFFF) << 64 | 2 << 62 | random & (1 << 62) - 1
    text = f"{value & (1 << 128) - 1:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


@dataclass(frozen=True, slots=True)
class TreeNode(Generic[M]):
    """A snapshot of one node of a tree. Changing it does not change the tree.

    Attributes:
        id: The id of the node.
        message: A copy of the message.
        parent_id: The id of the parent, or None for a root.
        children: The ids of the children, in order.
        metadata: A copy of the metadata.
        created_at: ISO 8601 text in UTC; empty if the document has none.
    """

    id: str
    message: M
    parent_id: str | None
    children: tuple[str, ...]
    metadata: dict[str, Any]
    created_at: str


@dataclass(frozen=True, slots=True)
class TreePath(Generic[M]):
    """The path from a root to a node.

    Attributes:
        messages: Copies of the messages, the root first.
        node_ids: The ids of their nodes.
    """

    messages: list[M]
    node_ids: list[str]


class MessageTree(Generic[M]):
    """A tree of messages. One node, the active leaf, marks the end of the current path.

    A message is any JSON value: dict, list, str, int, float, bool or None. Arguments and results are copied. Messages
    are immutable: an edited message is a new sibling of the old one. A tree is not thread-safe.

    A method that fails leaves the tree unchanged. Methods that take the id of a node, except `get`, raise
    `MessageNotFoundError` if the tree has no such node. Methods that take a message or metadata raise
    `InvalidDataError` for values that JSON cannot represent.

    Args:
        generate_id: Returns the ids of new nodes; UUIDs of version 7 by default. The ids must be unique among all
            writers of the conversation.

    Example:
        >>> tree = MessageTree(generate_id=iter("abc").__next__)
        >>> question = tree.append("What is 2 + 2?")
        >>> answer = tree.append("5")
        >>> better = tree.branch(question, "4")
        >>> tree.active_path.messages
        ['What is 2 + 2?', '4']
    """

    def __init__(self, *, generate_id: Callable[[], str] | None = None) -> None:
        self._generate_id = generate_id or new_id
        self._document = empty_document()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self)} messages, active leaf {self.active_leaf_id!r}>"

    def __len__(self) -> int:
        """Return the number of nodes in all branches."""
        return len(self._nodes)

    def __contains__(self, node_id: object) -> bool:
        return node_id in self._nodes

    @property
    def is_empty(self) -> bool:
        """Whether the tree has no nodes."""
        return not self._nodes

    @property
    def active_leaf_id(self) -> str | None:
        """The id of the last node of the current path, or None if the path is empty."""
        active: str | None = self._document["activeLeafId"]
        return active

    @property
    def root_ids(self) -> tuple[str, ...]:
        """The ids of the nodes without a parent, in order."""
        return tuple(self._document["rootIds"])

    @property
    def active_path(self) -> TreePath[M]:
        """The current path, from its root to the active leaf."""
        return TreePath([], []) if self.active_leaf_id is None else self.path_to(self.active_leaf_id)

    def get(self, node_id: str) -> TreeNode[M] | None:
        """Return a node, or None if the tree has no node with this id.

        Args:
            node_id: The id of the node.
        """
        return self._snapshot(node_id) if node_id in self._nodes else None

    def path_to(self, node_id: str) -> TreePath[M]:
        """Return the path from the root to a node.

        Args:
            node_id: The id of the node.

        Raises:
            MessageNotFoundError: The tree has no node with this id.
        """
        node_ids = self._path_ids(node_id)
        return TreePath([copy_json(self._nodes[each].get("message")) for each in node_ids], node_ids)

    def siblings(self, node_id: str) -> tuple[list[TreeNode[M]], int]:
        """Return the siblings of a node.

        Args:
            node_id: The id of the node.

        Returns:
            The children of the node's parent, including the node itself, and the index of the node in that list. The
            siblings of a root are the roots.

        Raises:
            MessageNotFoundError: The tree has no node with this id.
        """
        siblings = self._sibling_ids(node_id)
        return [self._snapshot(sibling) for sibling in siblings], siblings.index(node_id)

    def leaves(self) -> list[TreeNode[M]]:
        """Return the nodes without children."""
        return [self._snapshot(node_id) for node_id, node in self._nodes.items() if not node["children"]]

    def depth(self, node_id: str) -> int:
        """Return the distance of a node from its root; 0 for a root.

        Args:
            node_id: The id of the node.

        Raises:
            MessageNotFoundError: The tree has no node with this id.
        """
        return len(self._path_ids(node_id)) - 1

    def append(self, message: M, metadata: Mapping[str, Any] | None = None) -> str:
        """Add a message below the active leaf and make it the active leaf.

        Without an active leaf, the message becomes a root.

        Args:
            message: Any JSON value.
            metadata: A dict of JSON values to store with the message; empty by default.

        Returns:
            The id of the new node.

        Raises:
            InvalidDataError: JSON cannot represent the message or the metadata, or `generate_id` returned an invalid
                id.
        """
        return self.set_active_leaf(self._add_node(self.active_leaf_id, message, metadata))

    def add_root(self, message: M, metadata: Mapping[str, Any] | None = None) -> str:
        """Add a root and make it the active leaf. Arguments, result and errors are those of `append`."""
        return self.set_active_leaf(self._add_node(None, message, metadata))

    def add_child(self, parent_id: str, message: M, metadata: Mapping[str, Any] | None = None) -> str:
        """Add a message below a node without changing the active leaf.

        Args:
            parent_id: The id of the parent node.
            message: Any JSON value.
            metadata: A dict of JSON values to store with the message; empty by default.

        Returns:
            The id of the new node.

        Raises:
            MessageNotFoundError: The tree has no node `parent_id`.
            InvalidDataError: As for `append`.
        """
        self._require_node(parent_id)
        return self._add_node(parent_id, message, metadata)

    def branch(self, parent_id: str, message: M, metadata: Mapping[str, Any] | None = None) -> str:
        """Add a message below a node and make it the active leaf. Otherwise the same as `add_child`."""
        return self.set_active_leaf(self.add_child(parent_id, message, metadata))

    def set_active_leaf(self, node_id: str) -> str:
        """Make a node the end of the current path, and return its id. The node may have children.

        Args:
            node_id: The id of the node.

        Raises:
            MessageNotFoundError: The tree has no node with this id.
        """
        self._require_node(node_id)
        self._document["activeLeafId"] = node_id
        return node_id

    def rewind(self, node_id: str) -> None:
        """Make the parent of a node the end of the current path.

        The next appended message becomes a sibling of the node.

        Args:
            node_id: The id of the node.

        Raises:
            MessageNotFoundError: The tree has no node with this id.
        """
        self._document["activeLeafId"] = self._require_node(node_id)["parentId"]

    def next_sibling(self, node_id: str) -> str | None:
        """Switch to the next sibling of a node.

        The new active leaf is the first leaf below the sibling: the path follows first children.

        Args:
            node_id: The id of the node.

        Returns:
            The id of the active leaf. None if the node is the last sibling; then nothing changes.

        Raises:
            MessageNotFoundError: The tree has no node with this id.
        """
        return self._switch_sibling(node_id, 1)

    def prev_sibling(self, node_id: str) -> str | None:
        """Switch to the previous sibling of a node, in the same way as `next_sibling`.

        Args:
            node_id: The id of the node.

        Returns:
            The id of the active leaf. None if the node is the first sibling; then nothing changes.

        Raises:
            MessageNotFoundError: The tree has no node with this id.
        """
        return self._switch_sibling(node_id, -1)

    def remove(self, node_id: str) -> None:
        """Remove a node and its descendants.

        If this removes the active leaf, the new one is the first leaf below the last remaining sibling of the node.
        Without siblings it is the parent. Without a parent there is no active leaf.

        Args:
            node_id: The id of the node.

        Raises:
            MessageNotFoundError: The tree has no node with this id.
        """
        siblings = [sibling for sibling in self._sibling_ids(node_id) if sibling != node_id]
        parent_id = self._nodes[node_id]["parentId"]
        for removed in self._subtree_ids(node_id):
            del self._nodes[removed]
        self._set_children(parent_id, siblings)
        if self.active_leaf_id is not None and self.active_leaf_id not in self._nodes:
            self._document["activeLeafId"] = self._first_leaf(siblings[-1]) if siblings else parent_id

    def clear(self) -> None:
        """Remove all nodes."""
        self._document.update(nodes={}, rootIds=[], activeLeafId=None)

    def serialize(self) -> Document:
        """Return a copy of the document, as JSON values."""
        document: Document = copy_json(self._document, MAX_DEPTH + 3)
        return document

    @classmethod
    def deserialize(cls, data: Document, *, generate_id: Callable[[], str] | None = None) -> MessageTree[M]:
        """Create a tree from a document.

        Args:
            data: A document, as returned by `serialize`. It is copied.
            generate_id: As for the constructor.

        Returns:
            The tree.

        Raises:
            InvalidHistoryError: `data` is not a valid document.
        """
        tree = cls(generate_id=generate_id)
        tree._document = validate_document(data)
        return tree

    @property
    def _nodes(self) -> dict[str, Document]:
        nodes: dict[str, Document] = self._document["nodes"]
        return nodes

    def _require_node(self, node_id: str) -> Document:
        try:
            return self._nodes[node_id]
        except (KeyError, TypeError):
            raise MessageNotFoundError(node_id) from None

    def _snapshot(self, node_id: str) -> TreeNode[M]:
        node = self._nodes[node_id]
        return TreeNode(
            node_id,
            copy_json(node.get("message")),
            node["parentId"],
            tuple(node["children"]),
            copy_json(node.get("metadata", {})),
            node.get("createdAt", ""),
        )

    def _sibling_ids(self, node_id: str) -> list[str]:
        return self._child_ids(self._require_node(node_id)["parentId"])

    def _child_ids(self, parent_id: str | None) -> list[str]:
        children: list[str] = self._document["rootIds"] if parent_id is None else self._nodes[parent_id]["children"]
        return children

    def _add_node(
        self, parent_id: str | None, message: M, metadata: Mapping[str, Any] | None, node_id: str | None = None
    ) -> str:
        if not isinstance(metadata, Mapping | None):
            raise InvalidDataError(f"metadata must be a dict, not {type(metadata).__name__}")
        node = {
            "id": self._generate_id() if node_id is None else node_id,
            "message": copy_json(message),
            "parentId": parent_id,
            "children": [],
            "metadata": copy_json(dict(metadata or {})),
            "createdAt": utc_timestamp(),
        }
        new_id = node["id"]
        if not isinstance(new_id, str) or not new_id or new_id in self._nodes:
            raise InvalidDataError("generate_id must return a non-empty str that is not yet an id in this tree")
        self._nodes[new_id] = node
        self._set_children(parent_id, [*self._child_ids(parent_id), new_id])
        return new_id

    def _set_metadata(self, node_id: str, name: str, value: Any) -> None:
        node = self._nodes[node_id]
        self._nodes[node_id] = {**node, "metadata": {**node.get("metadata", {}), name: value}}

    def _set_children(self, parent_id: str | None, node_ids: list[str]) -> None:
        # Copies of the document share the nodes and lists: they are replaced, never changed.
        if parent_id is None:
            self._document["rootIds"] = node_ids
        else:
            self._nodes[parent_id] = {**self._nodes[parent_id], "children": node_ids}

    def _keep_only(self, node_id: str) -> None:
        """Remove all nodes but a root without children."""
        self._document.update(nodes={node_id: self._nodes[node_id]}, rootIds=[node_id])

    def _switch_sibling(self, node_id: str, step: int) -> str | None:
        siblings = self._sibling_ids(node_id)
        index = siblings.index(node_id) + step
        return self.set_active_leaf(self._first_leaf(siblings[index])) if 0 <= index < len(siblings) else None

    def _first_leaf(self, node_id: str) -> str:
        while children := self._nodes[node_id]["children"]:
            node_id = children[0]
        return node_id

    def _path_ids(self, node_id: str) -> list[str]:
        path = []
        parent_id: str | None = node_id
        while parent_id is not None:
            path.append(parent_id)
            parent_id = self._require_node(parent_id)["parentId"]
        return path[::-1]

    def _subtree_ids(self, node_id: str) -> list[str]:
        found = [node_id]
        for each in found:  # grows during the loop
            found += self._nodes[each]["children"]
        return found
