"""The three-way merge of conversations, as documents. Pure.

What a side has added, compared with the common base, stays; what a side has removed goes. Which side is which makes no
difference, but for the active leaf.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from heapq import merge as merged_by
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._document import Document

Key = Callable[[str], tuple[str, str]]


def merge(base: Document, ours: Document, theirs: Document) -> Document:
    """Merge two valid documents that came from the same base into one that is valid."""
    if theirs == base or ours == theirs:
        return ours
    if ours == base:
        return theirs
    age = _age_in({**theirs["nodes"], **ours["nodes"]})
    kept = _merged_items(_unlinked_nodes(base), _unlinked_nodes(ours), _unlinked_nodes(theirs), age)

    def end_of(side: Document) -> str | None:
        """Return where a side's current path ends: its active leaf, or what is left above it."""
        node_id: str | None = side["activeLeafId"]
        while node_id is not None and node_id not in kept:
            node_id = side["nodes"][node_id]["parentId"]
        return node_id

    ends = {"ours": end_of(ours), "theirs": end_of(theirs)}
    parents: dict[str, str | None] = {}
    for node_id, node in kept.items():
        parent_id = node["parentId"]
        if parent_id is not None and parent_id not in kept:  # removed by the side that does not have it
            parent_id = ends["theirs" if parent_id in ours["nodes"] else "ours"]
        parents[node_id] = parent_id
    children = _merged_children(base, ours, theirs, parents, _age_in(kept))
    _uproot_cycles(children, parents, {node_id: node["parentId"] for node_id, node in kept.items()})

    nodes = {key: {**node, "parentId": parents[key], "children": children[key]} for key, node in kept.items()}
    # Who has not moved along the conversation has no say in where it stands.
    order = ("ours", "theirs") if ours["activeLeafId"] != base["activeLeafId"] else ("theirs", "ours")
    active = next((ends[side] for side in order if ends[side] is not None), None)
    others = _merged_items(_other_items(base), _other_items(ours), _other_items(theirs), lambda key: ("", key))
    return {**others, "nodes": nodes, "rootIds": children[None], "activeLeafId": active}


def _unlinked_nodes(document: Document) -> dict[str, Any]:
    # Children are links: these are merged on their own.
    return {node_id: {**node, "children": None} for node_id, node in document["nodes"].items()}


def _other_items(document: Document) -> dict[str, Any]:
    return {**document, "nodes": None, "rootIds": None, "activeLeafId": None}


def _age_in(nodes: dict[str, Any]) -> Key:
    return lambda node_id: (nodes[node_id].get("createdAt", ""), node_id)


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


def _uproot_cycles(
    children: dict[str | None, list[str]], parents: dict[str, str | None], written: dict[str, str | None]
) -> None:
    """Make roots of nodes where both sides have hung their own below what the other has."""
    reached: set[str] = set()

    def reach(node_ids: Iterable[str]) -> None:
        todo = list(node_ids)
        for node_id in todo:  # which grows
            reached.add(node_id)
            todo += children[node_id]

    reach(children[None])
    # First those that are not where they were written: what was written together stays together.
    for node_id in sorted(parents.keys() - reached, key=lambda lost: (parents[lost] == written[lost], lost)):
        if node_id not in reached:
            children[parents[node_id]].remove(node_id)
            children[None].append(node_id)
            parents[node_id] = None
            reach([node_id])


def _merged_items(base: dict[str, Any], ours: dict[str, Any], theirs: dict[str, Any], age: Key) -> dict[str, Any]:
    """Merge three-way what is stored under each key."""
    merged = {}
    for key in _merged_order(list(base), list(ours), list(theirs), age):
        if key in ours and key in theirs:
            merged[key] = _merged_value(base.get(key), ours[key], theirs[key])
        elif key not in base:
            merged[key] = ours[key] if key in ours else theirs[key]
    return merged


def _merged_value(base: Any, ours: Any, theirs: Any) -> Any:
    if theirs in (base, ours):
        return ours
    if ours == base:
        return theirs
    return max(
        ours, theirs, key=lambda value: json.dumps(value, sort_keys=True)
    )  # any rule, if it is the same for both


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
