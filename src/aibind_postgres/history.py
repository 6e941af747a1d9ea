"""Conversations: a tree of messages, and one path through it that is the current one. Pure, no I/O.

A tree is kept as the document that @aibind/core reads and writes, so whatever else a document holds stays in it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from ._document import (
    MAX_LEVELS,
    Document,
    deep_copy,
    document_text,
    empty_document,
    known_document,
    now,
    parsed_document,
    valid_document,
)
from ._merging import merge
from .errors import InvalidDataError, MessageNotFoundError

M = TypeVar("M")


def new_id() -> str:
    """Return an unguessable id."""
    return str(uuid.uuid4())


@dataclass(frozen=True, slots=True)
class TreeNode(Generic[M]):
    """One message and its place in the tree, as they were when it was asked for.

    `children` are ids, in order; `created_at` is a text in ISO 8601, in UTC. Message and metadata are copies: changing
    them changes no tree.
    """

    id: str
    message: M
    parent_id: str | None
    children: tuple[str, ...]
    metadata: dict[str, Any]
    created_at: str


@dataclass(frozen=True, slots=True)
class TreePath(Generic[M]):
    """The messages from a root to a node, and the ids of their nodes."""

    messages: list[M]
    node_ids: list[str]


class MessageTree(Generic[M]):
    """A tree of messages in which one node, the active leaf, marks the current path.

    A message is any JSON value, of dict, list, str, int, float, bool and None; what goes in and what comes out are
    copies. Nodes do not change once they are there: an edited message is a new node beside the old one.

    `generate_id` makes the ids of nodes, which must be unique among all who write to the conversation; without it they
    are random. A method that is given the id of no node raises `MessageNotFoundError`, one that is given what JSON
    cannot hold `InvalidDataError`; both leave the tree as it was. Not made for several threads at once.
    """

    def __init__(self, *, generate_id: Callable[[], str] | None = None) -> None:
        self._generate_id = generate_id or new_id
        self._document = empty_document()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self)} messages, active leaf {self.active_leaf_id!r}>"

    def __len__(self) -> int:
        """Return the number of nodes, in all branches."""
        return len(self._nodes)

    def __contains__(self, node_id: object) -> bool:
        return node_id in self._nodes

    @property
    def is_empty(self) -> bool:
        """Whether there is no node."""
        return not self._nodes

    @property
    def active_leaf_id(self) -> str | None:
        """The node at which the current path ends, or None."""
        active: str | None = self._document["activeLeafId"]
        return active

    @property
    def root_ids(self) -> tuple[str, ...]:
        """The nodes without a parent, in order."""
        return tuple(self._document["rootIds"])

    @property
    def active_path(self) -> TreePath[M]:
        """The current path, from its root to the active leaf."""
        return TreePath([], []) if self.active_leaf_id is None else self.path_to(self.active_leaf_id)

    def get(self, node_id: str) -> TreeNode[M] | None:
        """Return a node, or None if there is none of this id."""
        return self._node(node_id) if node_id in self._nodes else None

    def path_to(self, node_id: str) -> TreePath[M]:
        """Return the path from a root to a node."""
        node_ids = self._path_ids(node_id)
        return TreePath([deep_copy(self._nodes[each].get("message")) for each in node_ids], node_ids)

    def siblings(self, node_id: str) -> tuple[list[TreeNode[M]], int]:
        """Return the children of a node's parent, itself among them, and its index there; of a root, the roots."""
        siblings = self._siblings(node_id)
        return [self._node(sibling) for sibling in siblings], siblings.index(node_id)

    def leaves(self) -> list[TreeNode[M]]:
        """Return the nodes without children."""
        return [self._node(node_id) for node_id, node in self._nodes.items() if not node["children"]]

    def depth(self, node_id: str) -> int:
        """Return how far a node is from its root: 0 for a root."""
        return len(self._path_ids(node_id)) - 1

    def append(self, message: M, metadata: Mapping[str, Any] | None = None) -> str:
        """Add a message below the active leaf, else a root, make it the active leaf and return its id."""
        return self.set_active_leaf(self._add(self.active_leaf_id, message, metadata))

    def add_root(self, message: M, metadata: Mapping[str, Any] | None = None) -> str:
        """Add a root, make it the active leaf and return its id."""
        return self.set_active_leaf(self._add(None, message, metadata))

    def add_child(self, parent_id: str, message: M, metadata: Mapping[str, Any] | None = None) -> str:
        """Add a message below a node and return its id. The active leaf stays where it is."""
        self._known(parent_id)
        return self._add(parent_id, message, metadata)

    def branch(self, parent_id: str, message: M, metadata: Mapping[str, Any] | None = None) -> str:
        """Add a message below a node, make it the active leaf and return its id."""
        return self.set_active_leaf(self.add_child(parent_id, message, metadata))

    def set_active_leaf(self, node_id: str) -> str:
        """Let the current path end at a node, a leaf or not, and return its id."""
        self._known(node_id)
        self._document["activeLeafId"] = node_id
        return node_id

    def rewind(self, node_id: str) -> None:
        """Let the current path end before a node, so that what is appended next becomes an alternative to it."""
        self._document["activeLeafId"] = self._known(node_id)["parentId"]

    def next_sibling(self, node_id: str) -> str | None:
        """Go to the sibling after a node, and from there by first children to a leaf, which becomes the active one.

        Returns the active leaf, or None if the node is the last one; then nothing changes.
        """
        return self._go(node_id, 1)

    def prev_sibling(self, node_id: str) -> str | None:
        """Go to the sibling before a node, as `next_sibling` does to the one after it."""
        return self._go(node_id, -1)

    def remove(self, node_id: str) -> None:
        """Remove a node and all below it.

        If the active leaf is among them, the last sibling that is left takes over, with its first children down to a
        leaf, else the parent, else nothing.
        """
        siblings = self._siblings(node_id)
        siblings.remove(node_id)
        parent_id = self._nodes[node_id]["parentId"]
        for removed in self._subtree(node_id):
            del self._nodes[removed]
        if self.active_leaf_id is not None and self.active_leaf_id not in self._nodes:
            self._document["activeLeafId"] = self._first_leaf(siblings[-1]) if siblings else parent_id

    def clear(self) -> None:
        """Remove all nodes."""
        self._document.update(nodes={}, rootIds=[], activeLeafId=None)

    def serialize(self) -> Document:
        """Return the document as JSON would hold it: a copy."""
        document: Document = deep_copy(self._document, MAX_LEVELS + 3)
        return document

    @classmethod
    def deserialize(cls, data: Document, *, generate_id: Callable[[], str] | None = None) -> MessageTree[M]:
        """Make a tree of a document, or raise `InvalidHistoryError`."""
        tree = cls(generate_id=generate_id)
        tree._document = valid_document(data)
        return tree

    @property
    def _nodes(self) -> dict[str, Document]:
        nodes: dict[str, Document] = self._document["nodes"]
        return nodes

    def _known(self, node_id: str) -> Document:
        try:
            return self._nodes[node_id]
        except (KeyError, TypeError):
            raise MessageNotFoundError(node_id) from None

    def _node(self, node_id: str) -> TreeNode[M]:
        node = self._nodes[node_id]
        return TreeNode(
            node_id,
            deep_copy(node.get("message")),
            node["parentId"],
            tuple(node["children"]),
            deep_copy(node.get("metadata", {})),
            node.get("createdAt", ""),
        )

    def _siblings(self, node_id: str) -> list[str]:
        return self._children(self._known(node_id)["parentId"])

    def _children(self, parent_id: str | None) -> list[str]:
        children: list[str] = self._document["rootIds"] if parent_id is None else self._nodes[parent_id]["children"]
        return children

    def _add(self, parent_id: str | None, message: M, metadata: Mapping[str, Any] | None) -> str:
        if not isinstance(metadata, Mapping | None):
            raise InvalidDataError("metadata must be a dict")
        node = {
            "id": self._generate_id(),
            "message": deep_copy(message),
            "parentId": parent_id,
            "children": [],
            "metadata": deep_copy(dict(metadata or {})),
            "createdAt": now(),
        }
        node_id = node["id"]
        if not isinstance(node_id, str) or not node_id or node_id in self._nodes:
            raise InvalidDataError("generate_id must return a new str, and not an empty one")
        self._nodes[node_id] = node
        self._children(parent_id).append(node_id)
        return node_id

    def _go(self, node_id: str, step: int) -> str | None:
        siblings = self._siblings(node_id)
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
            parent_id = self._known(parent_id)["parentId"]
        return path[::-1]

    def _subtree(self, node_id: str) -> list[str]:
        found = [node_id]
        for each in found:  # grows meanwhile
            found += self._nodes[each]["children"]
        return found


class Origin(NamedTuple):
    """What a store remembers of a history: whose it is, and what its row may hold if nobody else has changed it."""

    store: str
    session_id: str
    agreed: str | None  # the text that was stored when both were the same for certain; None: nothing
    digests: tuple[str | None, ...]  # of that, and of what was sent since; the last one is what is most likely there

    def with_sent(self, digest: str) -> Origin:
        """Return what is known once a text of this digest may be stored as well."""
        return self._replace(digests=(*(known for known in self.digests if known != digest), digest))


class ChatHistory(Generic[M]):
    """A conversation with branches: its current messages, and the alternatives to them.

    What holds for `MessageTree` holds here. `tree` is there for what goes beyond the usual operations of a chat.
    """

    def __init__(self, *, generate_id: Callable[[], str] | None = None) -> None:
        self.tree: MessageTree[M] = MessageTree(generate_id=generate_id)
        self._origin: Origin | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self)} messages, active leaf {self.tree.active_leaf_id!r}>"

    def __len__(self) -> int:
        """Return the number of messages, in all branches."""
        return len(self.tree)

    @property
    def messages(self) -> list[M]:
        """The messages of the current path, from the first one on."""
        return self.tree.active_path.messages

    @property
    def node_ids(self) -> list[str]:
        """The ids of the current messages."""
        return self.tree.active_path.node_ids

    @property
    def is_empty(self) -> bool:
        """Whether there is no message in any branch."""
        return self.tree.is_empty

    def append(self, message: M, metadata: Mapping[str, Any] | None = None) -> str:
        """Add a message at the end of the current path and return its id."""
        return self.tree.append(message, metadata)

    def edit(self, id: str, message: M) -> str:
        """Put another message beside this one, as an alternative; the current path ends there. Returns its id."""
        node = self.tree.get(id)
        if node is None:
            raise MessageNotFoundError(id)
        return self.tree.add_root(message) if node.parent_id is None else self.tree.branch(node.parent_id, message)

    def regenerate(self, id: str, message: M) -> str:
        """Put another answer beside this one; the same as `edit`."""
        return self.edit(id, message)

    def has_alternatives(self, id: str) -> bool:
        """Say whether a message has alternatives to it."""
        return self.alternative_count(id) > 1

    def alternative_count(self, id: str) -> int:
        """Return how many alternatives there are, this message among them."""
        return len(self.tree._siblings(id))

    def alternative_index(self, id: str) -> int:
        """Return the place of a message among its alternatives, from 0."""
        return self.tree._siblings(id).index(id)

    def next_alternative(self, id: str) -> str | None:
        """Let the current path go through the next alternative, and on by first children to a leaf.

        Returns the id of that leaf, or None if there is no further alternative; then nothing changes.
        """
        return self.tree.next_sibling(id)

    def prev_alternative(self, id: str) -> str | None:
        """Let the current path go through the alternative before this one, as `next_alternative` does."""
        return self.tree.prev_sibling(id)

    def compact(self, summary: M) -> str:
        """Replace all messages, in all branches, by one that sums them up, and return its id."""
        node_id = self.tree.add_root(summary, {"compacted": True, "compactedAt": now()})
        for root_id in self.tree.root_ids[:-1]:
            self.tree.remove(root_id)
        return node_id

    def to_json(self) -> str:
        """Return the document as text, the same for the same tree, for `from_json` or for the TypeScript package."""
        return document_text(self.tree._document)

    @classmethod
    def from_json(cls, text: str, *, generate_id: Callable[[], str] | None = None) -> ChatHistory[M]:
        """Make a history of a document's text, or raise `InvalidHistoryError`."""
        chat = cls(generate_id=generate_id)
        chat.tree._document = parsed_document(text)
        return chat

    def _follow(self, before: str, after: str) -> None:
        """Take over what has changed from one document of ours to another; what was changed here meanwhile stays."""
        document = known_document(after)
        if self.to_json() != before:
            document = merge(known_document(before), self.tree._document, document)
        self.tree._document = document
