"""Merge the documents of a conversation with a common base (three-way merge). Pure.

Additions of either side, relative to the common base, are kept. Removals of either side are applied. The result does
not depend on the order of the sides, except for the active leaf.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from heapq import merge as merge_sorted
from typing import TYPE_CHECKING, Any

from .errors import InvalidHistoryError

if TYPE_CHECKING:
    from ._document import Document

SortKey = Callable[[str], tuple[str, str]]
MergeValues = Callable[[Any, Any, Any], Any]


def merge(base: Document, ours: Document, theirs: Document) -> Document:
    """Merge two valid documents with a common base.

    Args:
        base: The document that both sides started from.
        ours: The document of the side that saves. Its active leaf wins if it has moved.
        theirs: The document of the other side.

    Returns:
        A valid document. It may be one of the arguments.

    Raises:
        InvalidHistoryError: Both sides used the same id for different messages.
    """
    if theirs == base or ours == theirs:
        return ours
    if ours == base:
        return theirs
    by_age = _by_age({**theirs["nodes"], **ours["nodes"]})
    kept = _merge_dicts(
        _nodes_without_links(base), _nodes_without_links(ours), _nodes_without_links(theirs), by_age, _merge_node
    )

    def kept_leaf(side: Document) -> str | None:
        """Return the active leaf of a side, or its nearest kept ancestor."""
        node_id: str | None = side["activeLeafId"]
        while node_id is not None and node_id not in kept:
            node_id = side["nodes"][node_id]["parentId"]
        return node_id

    leaves = {"ours": kept_leaf(ours), "theirs": kept_leaf(theirs)}

    def new_parent(node_id: str, parent_id: str | None) -> str | None:
        """Return the parent of a node in the merged tree, given its parent in the documents."""
        if parent_id is None or parent_id in kept:
            return parent_id
        # If an earlier merge has moved the node and its reply was lost, keep the parent of that merge.
        for side in (ours, theirs):
            if node_id in side["nodes"]:
                other_id: str | None = side["nodes"][node_id]["parentId"]
                if other_id is None or other_id in kept:
                    return other_id
        return leaves["theirs" if parent_id in ours["nodes"] else "ours"]  # the side that removed the parent

    parents = {node_id: new_parent(node_id, node["parentId"]) for node_id, node in kept.items()}
    children = _merge_children(base, ours, theirs, parents, _by_age(kept))
    _break_cycles(children, parents, {node_id: node["parentId"] for node_id, node in kept.items()})

    nodes = {key: {**node, "parentId": parents[key], "children": children[key]} for key, node in kept.items()}
    # A side that kept its active leaf defers to the other.
    order = ("ours", "theirs") if ours["activeLeafId"] != base["activeLeafId"] else ("theirs", "ours")
    active = next((leaves[side] for side in order if leaves[side] is not None), None)
    others = _merge_dicts(_other_fields(base), _other_fields(ours), _other_fields(theirs), _by_name, _merge_value)
    return {**others, "nodes": nodes, "rootIds": children[None], "activeLeafId": active}


def _nodes_without_links(document: Document) -> dict[str, Any]:
    # `_merge_children` merges the links.
    return {node_id: {**node, "children": None} for node_id, node in document["nodes"].items()}


def _other_fields(document: Document) -> dict[str, Any]:
    return {**document, "nodes": None, "rootIds": None, "activeLeafId": None}


def _by_age(nodes: dict[str, Any]) -> SortKey:
    return lambda node_id: (nodes[node_id].get("createdAt", ""), node_id)


def _by_name(key: str) -> tuple[str, str]:
    return "", key


def _merge_children(
    base: Document, ours: Document, theirs: Document, parents: dict[str, str | None], by_age: SortKey
) -> dict[str | None, list[str]]:
    """Return the children of each node, with the roots under None, in the order of both sides."""

    def child_ids(side: Document, parent_id: str | None) -> list[str]:
        ids = side["rootIds"] if parent_id is None else side["nodes"].get(parent_id, {}).get("children", [])
        return [node_id for node_id in ids if node_id in parents and parents[node_id] == parent_id]

    children: dict[str | None, list[str]] = {None: [], **{node_id: [] for node_id in parents}}
    listed = set()
    for parent_id, merged in children.items():
        in_base, in_ours, in_theirs = (child_ids(side, parent_id) for side in (base, ours, theirs))
        for node_id in _merge_order(in_base, in_ours, in_theirs, by_age):
            merged.append(node_id)
            listed.add(node_id)
    for node_id, parent_id in parents.items():
        if node_id not in listed:  # it was moved from another parent
            children[parent_id].append(node_id)
    return children


def _break_cycles(
    children: dict[str | None, list[str]], parents: dict[str, str | None], original_parents: dict[str, str | None]
) -> None:
    """Turn one node of each cycle into a root.

    A cycle arises if each side moved its own nodes below nodes of the other side.
    """
    reached: set[str | None] = set()

    def reach(node_ids: list[str]) -> None:
        todo = list(node_ids)
        for node_id in todo:  # grows during the loop
            reached.add(node_id)
            todo += children[node_id]

    reach(children[None])
    for unreached in parents:
        if unreached in reached:
            continue
        visited: dict[str, None] = {}
        node_id = unreached
        while node_id not in visited:
            visited[node_id] = None
            node_id = str(parents[node_id])
        path = list(visited)
        cycle = path[path.index(node_id) :]
        # Prefer a node that the merge has moved, so that the other nodes keep their parents.
        cut = min(cycle, key=lambda each: (parents[each] == original_parents[each], each))
        children[parents[cut]].remove(cut)
        children[None].append(cut)
        parents[cut] = None
        reach([cut])


def _merge_dicts(
    base: dict[str, Any], ours: dict[str, Any], theirs: dict[str, Any], sort_key: SortKey, merge_values: MergeValues
) -> dict[str, Any]:
    """Merge dicts: keys added by either side are kept, keys removed by either side are dropped."""
    merged = {}
    for key in _merge_order(list(base), list(ours), list(theirs), sort_key):
        if key in ours and key in theirs:
            merged[key] = merge_values(base.get(key), ours[key], theirs[key])
        elif key not in base:
            merged[key] = ours[key] if key in ours else theirs[key]
    return merged


def _merge_node(base: Any, ours: Any, theirs: Any) -> Any:
    if theirs in (base, ours):
        return ours
    messages = [(node or {}).get("message") for node in (base, ours, theirs)]
    if messages[1] != messages[2] and messages[0] not in messages[1:]:
        raise InvalidHistoryError("another message has the same id, which must be unique", ours["id"])
    return _merge_dicts(base or {}, ours, theirs, _by_name, _merge_value)


def _merge_value(base: Any, ours: Any, theirs: Any) -> Any:
    if theirs in (base, ours):
        return ours
    if ours == base:
        return theirs
    # Any rule is valid if it does not depend on the order of the sides.
    return max(ours, theirs, key=lambda value: json.dumps(value, sort_keys=True))


def _merge_order(base: list[str], ours: list[str], theirs: list[str], sort_key: SortKey) -> list[str]:
    """Merge the keys of both sides.

    Shared keys keep their order. The keys between two of them are merged by `sort_key`, each side in its own order.
    """
    if ours == base:
        return theirs
    if theirs in (base, ours):
        return ours
    in_ours, in_theirs = set(ours), set(theirs)
    shared = min([key for key in ours if key in in_theirs], [key for key in theirs if key in in_ours])
    sides: list[dict[str | None, list[str]]] = []
    for keys in (ours, theirs):
        anchor: str | None = None
        after: dict[str | None, list[str]] = {None: [], **{key: [] for key in shared}}
        for key in keys:
            if key in after:
                anchor = key
            else:
                after[anchor].append(key)
        sides.append(after)
    order = []
    for shared_key in (None, *shared):
        order += [] if shared_key is None else [shared_key]
        order += merge_sorted(*(after[shared_key] for after in sides), key=sort_key)
    return order
