"""Histories for property tests, made by random operations of a chat."""

from __future__ import annotations

import json
from itertools import count

from hypothesis import strategies as st

from aibind_postgres import ChatHistory

# Values that survive a JSON round trip unchanged.
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=5,
)

OPERATIONS = ["append", "append", "append", "edit", "add_root", "add_child", "go_to", "next", "remove", "compact"]

# A step is an operation, the index of its node, and the creation time of a new node.
STEPS = st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 30), st.integers(0, 3)), max_size=8)


def changed(text, steps, name):
    """Apply steps to the text of a document and return the new text. New nodes have the ids `name1`, `name2` …"""
    numbers = count(1)
    chat = ChatHistory.from_json(text, generate_id=lambda: f"{name}{next(numbers)}")
    times = {}
    for operation, index, time in steps:
        before = len(chat)
        node_ids = list(chat.tree.serialize()["nodes"])
        node_id = node_ids[index % len(node_ids)] if node_ids else None
        new = None
        if operation == "append":
            new = chat.append({"by": name})
        elif operation == "add_root":
            new = chat.tree.add_root({"by": name})
        elif operation == "compact":
            new = chat.compact({"by": name})
        elif node_id is None:
            continue
        elif operation == "edit":
            new = chat.edit(node_id, {"by": name})
        elif operation == "add_child":
            new = chat.tree.add_child(node_id, {"by": name})
        elif operation == "go_to":
            chat.tree.set_active_leaf(node_id)
        elif operation == "next":
            chat.next_alternative(node_id)
        elif operation == "remove":
            chat.tree.remove(node_id)
            assert len(chat) < before
        if new is not None:
            times[new] = f"2026-01-01T00:00:00.00{time}Z"
    document = chat.tree.serialize()
    for node_id, node in document["nodes"].items():
        node["createdAt"] = times.get(node_id, node["createdAt"])
    return json.dumps(document, separators=(",", ":"))


EMPTY = ChatHistory().to_json()
HISTORIES = st.builds(changed, st.just(EMPTY), STEPS, st.just("b"))
# A base, and two sides that have changed it independently.
FORKS = st.builds(
    lambda base, ours, theirs: tuple(map(json.loads, (base, changed(base, ours, "o"), changed(base, theirs, "t")))),
    HISTORIES,
    STEPS,
    STEPS,
)
