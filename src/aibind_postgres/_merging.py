"""The three-way merge of conversations, as documents. Pure.

What a side has added, compared with the common base, stays; what a side has removed goes. Which side is which makes no
difference, but for the active leaf.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from heapq import merge as merged_by
from typing import TYPE_CHECKING, Any

from .errors import InvalidHistoryError

if TYPE_CHECKING:
    from ._document import Document

Key = Callable[[str], tuple[str, str]]
MergeValue = Callable[[Any, Any, Any], Any]


def merge(base: Document, ours: Document, theirs: Document) -> Document:
    """Merge two valid documents that came from the same base into one that is valid.

    Raises `InvalidHistoryError` if both have put a message of their own under one id.
    """
    if theirs == base or ours == theirs:
        return ours
    if ours == base:
        return theirs
    age = _age_in({**theirs["nodes"], **ours["nodes"]})
    kept = _merged_items(_unlinked_nodes(base), _unlinked_nodes(ours), _unlinked_nodes(theirs), age, _merged_node)

    def end_of(side: Document) -> str | None:
        """Return where a side's current path ends: its active leaf, or what is left above it."""
        node_id: str | None = side["activeLeafId"]
        while node_id is not None and node_id not in kept:
            node_id = side["nodes"][node_id]["parentId"]
        return node_id

    ends = {"ours": end_of(ours), "theirs": end_of(theirs)}

    def parent_of(node_id: str, parent_id: str | None) -> str | None:
        """Return where a node comes that was written below this parent."""
        if parent_id is None or parent_id in kept:
            return parent_id
        # An earlier merge with the same side, of which no reply came, may have found a place for it.
        for side in (ours, theirs):
            if node_id in side["nodes"]:
                other_id: str | None = side["nodes"][node_id]["parentId"]
                if other_id is None or other_id in kept:
                    return other_id
        return ends["theirs" if parent_id in ours["nodes"] else "ours"]  # of the side that has removed the parent

    parents = {node_id: parent_of(node_id, node["parentId"]) for node_id, node in kept.items()}
    children = _merged_children(base, ours, theirs, parents, _age_in(kept))
    _cut_rings(children, parents, {node_id: node["parentId"] for node_id, node in kept.items()})

    nodes = {key: {**node, "parentId": parents[key], "children": children[key]} for key, node in kept.items()}
    # Who has not moved along the conversation has no say in where it stands.
    order = ("ours", "theirs") if ours["activeLeafId"] != base["activeLeafId"] else ("theirs", "ours")
    active = next((ends[side] for side in order if ends[side] is not None), None)
    others = _merged_items(_other_items(base), _other_items(ours), _other_items(theirs), _by_name, _merged_value)
    return {**others, "nodes": nodes, "rootIds": children[None], "activeLeafId": active}


def _unlinked_nodes(document: Document) -> dict[str, Any]:
    # Children are links: these are merged on their own.
    return {node_id: {**node, "children": None} for node_id, node in document["nodes"].items()}


def _other_items(document: Document) -> dict[str, Any]:
    return {**document, "nodes": None, "rootIds": None, "activeLeafId": None}


def _age_in(nodes: dict[str, Any]) -> Key:
    return lambda node_id: (nodes[node_id].get("createdAt", ""), node_id)


def _by_name(key: str) -> tuple[str, str]:
    return "", key


def _merged_children(
    base: Document, ours: Document, theirs: Document, parents: dict[str, str | None], age: Key
) -> dict[str | None, list[str]]:
    """Return the children of each node, and of None the roots, in the order that the sides have them in."""

    def listed(side: Document, parent_id: str | None) -> list[str]:
        ids = side["rootIds"] if parent_id is None else side["nodes"].get(parent_id, {}).get("children", [])
        return [node_id for node_id in ids if node_id in parents and parents[node_id] == parent_id]

    children: dict[str | None, list[str]] = {None: [], **{node_id: [] for node_id in parents}}
    placed = set()
    for parent_id, found in children.items():
        for node_id in _merged_order(listed(base, parent_id), listed(ours, parent_id), listed(theirs, parent_id), age):
            found.append(node_id)
            placed.add(node_id)
    for node_id, parent_id in parents.items():
        if node_id not in placed:  # it has come here from another parent
            children[parent_id].append(node_id)
    return children


def _cut_rings(
    children: dict[str | None, list[str]], parents: dict[str, str | None], written: dict[str, str | None]
) -> None:
    """Make a root of one node in each ring: there, both sides have hung their own below what the other one has."""
    reached: set[str | None] = set()

    def reach(node_ids: list[str]) -> None:
        todo = list(node_ids)
        for node_id in todo:  # which grows
            reached.add(node_id)
            todo += children[node_id]

    reach(children[None])
    for lost in parents:
        if lost in reached:
            continue
        ring: dict[str, None] = {}  # at first, also the way to it
        while lost not in ring:
            ring[lost] = None
            lost = str(parents[lost])
        way = list(ring)
        # One that is not where it was written, if there is one: what was written together stays together.
        cut = min(way[way.index(lost) :], key=lambda node_id: (parents[node_id] == written[node_id], node_id))
        children[parents[cut]].remove(cut)
        children[None].append(cut)
        parents[cut] = None
        reach([cut])


def _merged_items(
    base: dict[str, Any], ours: dict[str, Any], theirs: dict[str, Any], age: Key, merged_value: MergeValue
) -> dict[str, Any]:
    """Merge three-way what is stored under each key."""
    merged = {}
    for key in _merged_order(list(base), list(ours), list(theirs), age):
        if key in ours and key in theirs:
            merged[key] = merged_value(base.get(key), ours[key], theirs[key])
        elif key not in base:
            merged[key] = ours[key] if key in ours else theirs[key]
    return merged


def _merged_node(base: Any, ours: Any, theirs: Any) -> Any:
    if theirs in (base, ours):
        return ours
    messages = [(node or {}).get("message") for node in (base, ours, theirs)]
    if messages[1] != messages[2] and messages[0] not in messages[1:]:
        raise InvalidHistoryError("another message has the same id, which must be unique", ours["id"])
    return _merged_items(base or {}, ours, theirs, _by_name, _merged_value)


def _merged_value(base: Any, ours: Any, theirs: Any) -> Any:
    if theirs in (base, ours):
        return ours
    if ours == base:
        return theirs
    # Any rule will do that takes the same one whichever side is ours.
    return max(ours, theirs, key=lambda value: json.dumps(value, sort_keys=True))


def _merged_order(base: list[str], ours: list[str], theirs: list[str], age: Key) -> list[str]:
    """Return what is in either list, in the order of both; between two that are in both, the older ones first."""
    if ours == base:
        return theirs
    if theirs in (base, ours):
        return ours
    in_ours, in_theirs = set(ours), set(theirs)
    shared = min([key for key in ours if key in in_theirs], [key for key in theirs if key in in_ours])
    after: list[dict[str | None, list[str]]] = []
    for keys in (ours, theirs):
        last: str | None = None
        behind: dict[str | None, list[str]] = {None: [], **{key: [] for key in shared}}
        for key in keys:
            if key in behind:
                last = key
            else:
                behind[last].append(key)
        after.append(behind)
    order = []
    for anchor in (None, *shared):
        order += [] if anchor is None else [anchor]
        order += merged_by(*(behind[anchor] for behind in after), key=age)
    return order
