"""The JSON document that a conversation is stored as, shared with @aibind/core: reading, checking, writing. Pure."""

from __future__ import annotations

import json
import re
from datetime import datetime, timezone
from math import isfinite
from typing import Any, TypeAlias

from .errors import InvalidDataError, InvalidHistoryError

Document: TypeAlias = dict[str, Any]

VERSION = 1
# Python's own limits must not come up later, when a message is read or saved.
MAX_LEVELS = 200  # of nesting
MAX_BITS = 14_000  # of an int: Python writes 4,300 digits


def empty_document() -> Document:
    """Return the document of a conversation without messages."""
    return {"version": VERSION, "nodes": {}, "rootIds": [], "activeLeafId": None}


def now() -> str:
    """Return the time as a document has it."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def deep_copy(value: Any, levels: int = MAX_LEVELS) -> Any:
    """Return a copy of a JSON value, or raise `InvalidDataError` for what is none."""
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, (dict, list)):
        if not levels:
            raise InvalidDataError(f"not a JSON value that can be kept: it has more than {MAX_LEVELS} levels")
        if isinstance(value, list):
            return [deep_copy(item, levels - 1) for item in value]
        for key in value:
            if not isinstance(key, str):
                raise InvalidDataError("not a JSON value: a dict in it has a key that is not a str")
        return {key: deep_copy(item, levels - 1) for key, item in value.items()}
    if isinstance(value, float) and isfinite(value):
        return value
    if isinstance(value, int) and value.bit_length() <= MAX_BITS:
        return value
    raise InvalidDataError(f"not a JSON value: there is a {type(value).__name__} in it that JSON cannot hold")


def document_text(document: Document) -> str:
    """Return a document as text, the same for the same document."""
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    # Half of a pair of surrogates, which is left where JavaScript cuts a text, is no character, but can be escaped.
    return re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text)


def parsed_document(text: str) -> Document:
    """Return the document that a text holds, or raise `InvalidHistoryError`."""
    try:
        text.encode()
        data = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError, AttributeError):
        # The causes hold the text.
        raise InvalidHistoryError("it is not JSON text, or has too many levels") from None
    return valid_document(data)


def known_document(text: str) -> Document:
    """Return the document of a text that was written or checked here."""
    document: Document = json.loads(text)
    return document


def valid_document(data: Any) -> Document:
    """Return a copy of a document, or raise `InvalidHistoryError` if it is none."""
    if not isinstance(data, dict) or type(data.get("version")) is not int or data["version"] != VERSION:
        raise InvalidHistoryError(f"it is not an object of version {VERSION}")
    if not isinstance(data.get("nodes"), dict) or not _are_ids(data.get("rootIds")):
        raise InvalidHistoryError("its nodes are not an object, or its rootIds are not a list of ids")
    try:
        document: Document = deep_copy({**data, "nodes": None})
    except InvalidDataError as error:
        raise InvalidHistoryError(str(error)) from None
    document["nodes"] = {node_id: _valid_node(node_id, node) for node_id, node in data["nodes"].items()}
    _check_links(document)
    return document


def _valid_node(node_id: str, node: Any) -> Document:
    if not isinstance(node_id, str) or not isinstance(node, dict) or node.get("id") != node_id:
        raise InvalidHistoryError("it is not an object with its own id", node_id)
    if not _are_ids(node.get("children")):
        raise InvalidHistoryError("its children are not a list of ids", node_id)
    if not isinstance(node.get("parentId", 0), (str, type(None))):
        raise InvalidHistoryError("its parentId is neither an id nor null", node_id)
    if not isinstance(node.get("metadata", {}), dict) or not isinstance(node.get("createdAt", ""), str):
        raise InvalidHistoryError("its metadata is not an object, or its createdAt is not a text", node_id)
    try:
        copy: Document = deep_copy(node, MAX_LEVELS + 1)
    except InvalidDataError as error:
        raise InvalidHistoryError(str(error), node_id) from None
    return copy


def _check_links(document: Document) -> None:
    """Raise `InvalidHistoryError` unless each node is a child of its parent, once, and has a root above it."""
    nodes = document["nodes"]
    listed = set()
    for parent_id, children in [(None, document["rootIds"]), *((key, node["children"]) for key, node in nodes.items())]:
        for child_id in children:
            if child_id not in nodes:
                if parent_id is None:
                    raise InvalidHistoryError("it is a root, and missing", child_id)
                raise InvalidHistoryError(f"its child, {child_id!r}, is missing", parent_id)
            if nodes[child_id]["parentId"] != parent_id:
                raise InvalidHistoryError(f"it is listed below {parent_id!r}, which is not its parent", child_id)
            if child_id in listed:
                raise InvalidHistoryError("it is listed twice", child_id)
            listed.add(child_id)
    reached = list(document["rootIds"])
    for node_id in reached:  # which grows
        reached += nodes[node_id]["children"]
    if len(reached) < len(nodes):
        found = set(reached)
        lost = next(node_id for node_id in nodes if node_id not in found)
        if (parent_id := nodes[lost]["parentId"]) is not None and parent_id not in nodes:
            raise InvalidHistoryError(f"its parent, {parent_id!r}, is missing", lost)
        if lost not in listed:
            raise InvalidHistoryError("it is not listed below its parent, or among the roots", lost)
        raise InvalidHistoryError("it is part of a cycle, or below one, or below a node that is not listed", lost)
    active = document.get("activeLeafId", 0)
    if active is not None and not isinstance(active, str):
        raise InvalidHistoryError("its activeLeafId is neither an id nor null")
    if active is not None and active not in nodes:
        raise InvalidHistoryError("it is the active leaf, and missing", active)


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _refuse(constant: str) -> Any:
    raise ValueError(f"JSON has no {constant}")
