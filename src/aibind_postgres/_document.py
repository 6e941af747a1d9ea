"""Parse, validate and serialize the JSON document of a conversation, in the format of @aibind/core. Pure."""

from __future__ import annotations

import json
import re
from datetime import datetime, timezone
from hashlib import sha256
from itertools import islice
from math import isfinite
from typing import Any, NamedTuple, TypeAlias

from ._concurrency import LARGE
from ._json import reject_constant
from .errors import InvalidDataError, InvalidHistoryError

Document: TypeAlias = dict[str, Any]

VERSION = 1
# Limits below those of Python, which would fail only when a message is read or saved.
MAX_DEPTH = 200  # levels of nesting
MAX_INT_BITS = 14_000  # Python converts at most 4,300 digits

NODE_CHARACTERS = 200  # of a node without its message
BATCH_NODES = 16  # nodes that one call of json.dumps serializes, since it holds the GIL


class Version(NamedTuple):
    """A document, its text, and the digest of the text."""

    document: Document
    text: str
    digest: str

    @classmethod
    def of(cls, document: Document) -> Version:
        """Return the version of a document that will not change."""
        text = serialize_document(document)
        return cls(document, text, digest(text))


def digest(text: str) -> str:
    """Return the digest of a text, as SQL computes it."""
    return sha256(text.encode()).hexdigest()


def empty_document() -> Document:
    """Return the document of a conversation without messages."""
    return {"version": VERSION, "nodes": {}, "rootIds": [], "activeLeafId": None}


def copy_document(document: Document) -> Document:
    """Return a copy that shares the nodes: these are replaced, never changed."""
    return {**document, "nodes": dict(document["nodes"])}


def estimated_size(document: Document) -> int:
    """Return roughly the number of characters of a document. Stop counting at `LARGE`."""
    size = 0
    for node in reversed(document["nodes"].values()):  # the newest first: it may be the largest
        size += NODE_CHARACTERS + _text_size(node.get("message"))
        if size >= LARGE:
            break
    return size


def _text_size(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_text_size, value.values()))
    return sum(map(_text_size, value)) if isinstance(value, list) else 1


def utc_timestamp() -> str:
    """Return the current time in the format of the document: ISO 8601, UTC, milliseconds."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def copy_json(value: Any, depth: int = MAX_DEPTH) -> Any:
    """Return a deep copy of a JSON value.

    Args:
        value: The value to copy.
        depth: The maximum levels of nesting; 200 by default.

    Raises:
        InvalidDataError: `value` is not a JSON value, or is nested more deeply than `depth`.
    """
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, (dict, list)):
        if not depth:
            raise InvalidDataError(f"not a JSON value that can be stored: nested more than {MAX_DEPTH} levels deep")
        if isinstance(value, list):
            return [copy_json(item, depth - 1) for item in value]
        for key in value:
            if not isinstance(key, str):
                raise InvalidDataError("not a JSON value: a dict has a key that is not a str")
        return {key: copy_json(item, depth - 1) for key, item in value.items()}
    if isinstance(value, float) and isfinite(value):
        return value
    if isinstance(value, int) and value.bit_length() <= MAX_INT_BITS:
        return value
    raise InvalidDataError(f"not a JSON value: JSON cannot represent this {type(value).__name__}")


def serialize_document(document: Document) -> str:
    """Return a document as JSON text. Documents that are equal, also in the order of keys, give equal texts."""
    text = ",".join(
        [
            f"{_to_json(key)}:{_nodes_to_json(value) if key == 'nodes' else _to_json(value)}"
            for key, value in document.items()
        ]
    )
    return f"{{{text}}}"


def _nodes_to_json(nodes: dict[str, Any]) -> str:
    items = iter(nodes.items())
    batches = iter(lambda: dict(islice(items, BATCH_NODES)), {})
    return "{" + ",".join([_to_json(batch)[1:-1] for batch in batches]) + "}"


def _to_json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    try:
        text.encode()
    except UnicodeEncodeError:  # JavaScript can split a surrogate pair. A lone surrogate is escaped.
        return re.sub("[\ud800-\udfff]", lambda surrogate: f"\\u{ord(surrogate[0]):04x}", text)
    return text


def parse_document(text: str) -> Document:
    """Parse and validate the text of a document.

    Raises:
        InvalidHistoryError: The text is not JSON, or not a valid document.
    """
    try:
        text.encode()
        data = json.loads(text, parse_constant=reject_constant, object_hook=_let_threads_run)
    except (ValueError, RecursionError, AttributeError):
        # `from None`: the original errors contain the text of the conversation.
        raise InvalidHistoryError("it is not JSON, or is nested too deeply") from None
    return validate_document(data)


def validate_document(data: Any) -> Document:
    """Validate a document and return a copy.

    Raises:
        InvalidHistoryError: `data` is not a valid document.
    """
    if not isinstance(data, dict) or type(data.get("version")) is not int or data["version"] != VERSION:
        raise InvalidHistoryError(f"it is not an object of version {VERSION}")
    if not isinstance(data.get("nodes"), dict) or not _is_id_list(data.get("rootIds")):
        raise InvalidHistoryError("nodes must be an object, and rootIds a list of ids")
    try:
        document: Document = copy_json({**data, "nodes": None})
    except InvalidDataError as error:
        raise InvalidHistoryError(str(error)) from None
    document["nodes"] = {node_id: _validate_node(node_id, node) for node_id, node in data["nodes"].items()}
    _check_links(document)
    return document


def _validate_node(node_id: str, node: Any) -> Document:
    if not isinstance(node_id, str) or not isinstance(node, dict) or node.get("id") != node_id:
        raise InvalidHistoryError("it must be an object with its own id", node_id)
    if not _is_id_list(node.get("children")):
        raise InvalidHistoryError("children must be a list of ids", node_id)
    if not isinstance(node.get("parentId", 0), (str, type(None))):
        raise InvalidHistoryError("parentId must be an id or null", node_id)
    if not isinstance(node.get("metadata", {}), dict) or not isinstance(node.get("createdAt", ""), str):
        raise InvalidHistoryError("metadata must be an object, and createdAt a string", node_id)
    try:
        copy: Document = copy_json(node, MAX_DEPTH + 1)
    except InvalidDataError as error:
        raise InvalidHistoryError(str(error), node_id) from None
    return copy


def _check_links(document: Document) -> None:
    """Raise `InvalidHistoryError` unless each node is listed once, by its parent, and is reachable from a root."""
    nodes = document["nodes"]
    listed = set()
    for parent_id, children in [(None, document["rootIds"]), *((key, node["children"]) for key, node in nodes.items())]:
        for child_id in children:
            if child_id not in nodes:
                if parent_id is None:
                    raise InvalidHistoryError("it is listed as a root, but missing", child_id)
                raise InvalidHistoryError(f"its child {child_id!r} is missing", parent_id)
            if nodes[child_id]["parentId"] != parent_id:
                raise InvalidHistoryError(f"it is listed below {parent_id!r}, which is not its parent", child_id)
            if child_id in listed:
                raise InvalidHistoryError("it is listed twice", child_id)
            listed.add(child_id)
    reached = list(document["rootIds"])
    for node_id in reached:  # grows during the loop
        reached += nodes[node_id]["children"]
    if len(reached) < len(nodes):
        reached_ids = set(reached)
        unreached = next(node_id for node_id in nodes if node_id not in reached_ids)
        if (parent_id := nodes[unreached]["parentId"]) is not None and parent_id not in nodes:
            raise InvalidHistoryError(f"its parent {parent_id!r} is missing", unreached)
        if unreached not in listed:
            raise InvalidHistoryError("it is not listed below its parent, or among the roots", unreached)
        raise InvalidHistoryError("it belongs to a cycle, or is below a cycle or a node that is not listed", unreached)
    active = document.get("activeLeafId", 0)
    if active is not None and not isinstance(active, str):
        raise InvalidHistoryError("activeLeafId must be an id or null")
    if active is not None and active not in nodes:
        raise InvalidHistoryError("it is the active leaf, but missing", active)


def _is_id_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _let_threads_run(value: Any) -> Any:
    # The parser holds the GIL, except while it calls Python code.
    return value
