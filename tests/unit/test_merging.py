"""The three-way merge: properties for random changes of both sides, and the typical cases."""

from __future__ import annotations

import json

import pytest
from hypothesis import assume, event, given, settings
from support.histories import EMPTY, FORKS, HISTORIES, changed

from aibind_postgres import InvalidHistoryError
from aibind_postgres._document import validate_document
from aibind_postgres._merging import merge


def without_active_leaf(document):
    return json.dumps({**document, "activeLeafId": None})  # includes the order of keys


def path_end(side, kept):
    """Return the active leaf, or its nearest ancestor that is kept."""
    id = side["activeLeafId"]
    while id is not None and id not in kept:
        id = side["nodes"][id]["parentId"]
    return id


@given(FORKS)
def test_additions_are_kept_and_removals_applied(fork):
    base, ours, theirs = (set(document["nodes"]) for document in fork)
    merged = merge(*fork)
    assert set(merged["nodes"]) == (ours | theirs) - (base - ours) - (base - theirs)


@given(FORKS)
def test_merged_tree_is_valid_and_keeps_the_messages(fork):
    _, ours, theirs = fork
    merged = merge(*fork)
    assert validate_document(merged) == merged
    originals = {**ours["nodes"], **theirs["nodes"]}
    links = {"parentId": None, "children": None}
    for id, node in merged["nodes"].items():
        assert {**node, **links} == {**originals[id], **links}


@given(FORKS)
def test_order_of_sides_matters_only_for_the_active_leaf(fork):
    base, ours, theirs = fork
    assert without_active_leaf(merge(base, ours, theirs)) == without_active_leaf(merge(base, theirs, ours))


@given(FORKS)
def test_merging_equal_trees_changes_nothing(fork):
    base, ours, _ = fork
    for pair in ((base, ours, ours), (ours, ours, ours), (json.loads(EMPTY), ours, ours)):
        assert json.dumps(merge(*pair)) == json.dumps(ours)


@given(FORKS)
def test_unchanged_side_gets_the_other_side(fork):
    base, ours, _ = fork
    assert json.dumps(merge(base, ours, base)) == json.dumps(merge(base, base, ours)) == json.dumps(ours)


@settings(max_examples=500)
@given(FORKS)
def test_node_keeps_its_parent_or_moves_to_the_path_end_of_the_removing_side(fork):
    _, ours, theirs = fork
    merged = merge(*fork)
    kept = merged["nodes"]
    new_roots = 0
    for side, other in ((ours, theirs), (theirs, ours)):
        for id, node in side["nodes"].items():
            if id not in kept:
                continue
            if node["parentId"] is None or node["parentId"] in kept:
                assert kept[id]["parentId"] == node["parentId"]
            elif kept[id]["parentId"] is not None:
                event("moved below the path end of the other side")
                assert kept[id]["parentId"] == path_end(other, kept)
            elif path_end(other, kept) is not None:
                new_roots += 1
    if new_roots:
        # Each side moved its own nodes below nodes of the other side: one cycle.
        event("turned into a root")
        assert new_roots == 1
        assert all(side["nodes"].keys() - kept.keys() for side in (ours, theirs))


@given(FORKS)
def test_siblings_keep_the_order_of_both_sides(fork):
    merged = merge(*fork)
    for side in fork[1:]:
        for parent, found in [(None, merged["rootIds"]), *((id, n["children"]) for id, n in merged["nodes"].items())]:
            children = side["rootIds"] if parent is None else side["nodes"].get(parent, {}).get("children", [])
            kept_children = [id for id in children if id in found]
            assert [id for id in found if id in kept_children] == kept_children


@given(FORKS)
def test_active_leaf_of_the_saving_side_wins_if_it_moved(fork):
    base, ours, theirs = fork
    merged = merge(*fork)
    kept = merged["nodes"]
    moved = ours["activeLeafId"] != base["activeLeafId"]
    first, second = (ours, theirs) if moved else (theirs, ours)
    assert merged["activeLeafId"] == (path_end(first, kept) or path_end(second, kept))
    if moved and ours["activeLeafId"] in kept:
        assert merged["activeLeafId"] == ours["activeLeafId"]


@given(HISTORIES, HISTORIES)
def test_empty_base_keeps_all_nodes(ours, theirs):
    ours, theirs = json.loads(ours), json.loads(theirs.replace('"b', '"t'))
    assume(ours != theirs)
    assert set(merge(json.loads(EMPTY), ours, theirs)["nodes"]) == set(ours["nodes"]) | set(theirs["nodes"])


@settings(max_examples=500)
@given(FORKS)
def test_repeated_merge_changes_no_parents(fork):
    # Repeats a save whose reply was lost.
    base, ours, theirs = fork
    once = merge(base, ours, theirs)
    again = merge(base, ours, once)
    assert {id: node["parentId"] for id, node in again["nodes"].items()} == {
        id: node["parentId"] for id, node in once["nodes"].items()
    }


def fork(base, ours, theirs):
    """Return a base and two sides, each made by steps such as ("append", 0)."""
    base = changed(EMPTY, [(*step, 0) for step in base], "b")
    sides = (changed(base, [(*step, 0) for step in steps], name) for steps, name in ((ours, "o"), (theirs, "t")))
    return tuple(map(json.loads, (base, *sides)))


def links(document):
    return {None: document["rootIds"], **{id: node["children"] for id, node in document["nodes"].items()}}


TURN = [("append", 0), ("append", 0)]


def test_concurrent_tabs_give_two_branches():
    merged = merge(*fork(TURN, TURN, TURN))
    assert links(merged) == {
        None: ["b1"],
        "b1": ["b2"],
        "b2": ["o1", "t1"],
        "o1": ["o2"],
        "o2": [],
        "t1": ["t2"],
        "t2": [],
    }
    assert merged["activeLeafId"] == "o2"


def test_messages_added_during_compact_move_below_the_summary():
    compacting = [("compact", 0)]
    for ours, theirs, active in ((TURN, compacting, "o2"), (compacting, TURN, "o1")):
        merged = merge(*fork(TURN, ours, theirs))
        summary, first = ("t1", "o1") if ours is TURN else ("o1", "t1")
        assert links(merged)[None] == [summary]
        assert links(merged)[summary] == [first]
        assert merged["activeLeafId"] == active


def test_two_summaries_are_two_roots():
    merged = merge(*fork(TURN, [("compact", 0)], [("compact", 0)]))
    assert links(merged) == {None: ["o1", "t1"], "o1": [], "t1": []}


def test_deleted_messages_do_not_come_back():
    base, ours, _ = fork(TURN, TURN, [])
    merged = merge(base, ours, json.loads(EMPTY))
    assert links(merged) == {None: ["o1"], "o1": ["o2"], "o2": []}
    assert merged["activeLeafId"] == "o2"
    assert merge(base, base, json.loads(EMPTY)) == json.loads(EMPTY)


def test_both_sides_removed_the_parent_of_the_other():
    # Two roots; each side removes one of them and appends to the other.
    merged = merge(
        *fork(
            [("append", 0), ("add_root", 0)],
            [("add_child", 0), ("remove", 1), ("go_to", 1)],
            [("add_child", 1), ("remove", 0), ("go_to", 1)],
        )
    )
    assert links(merged) == {None: ["o1"], "o1": ["t1"], "t1": []}


def test_cycle_is_broken_at_a_moved_node():
    base, *_ = fork([("append", 0), ("add_root", 0)], [], [])

    def side(removed, *added):
        """Return the base without one root, and with a chain of nodes below the other. The last one is active."""
        document = json.loads(json.dumps(base))
        del document["nodes"][removed]
        [root] = document["rootIds"] = [id for id in document["rootIds"] if id != removed]
        for parent, id in zip((root, *added[:-1]), added, strict=True):
            document["nodes"][parent]["children"].append(id)
            document["nodes"][id] = {"id": id, "message": id, "parentId": parent, "children": []}
        return validate_document({**document, "activeLeafId": added[-1]})

    # The lowest ids are a node below its original parent, and a node outside the cycle: neither may be cut.
    ours, theirs = side("b2", "o2", "o1"), side("b1", "t2", "t1")
    ours["nodes"]["b1"]["children"].append("n")
    ours["nodes"]["n"] = {"id": "n", "message": "n", "parentId": "b1", "children": []}
    for pair in ((ours, theirs), (theirs, ours)):
        merged = merge(base, *pair)
        assert links(merged) == {None: ["o2"], "o2": ["o1"], "o1": ["t2"], "t2": ["t1"], "t1": ["n"], "n": []}


def test_duplicate_ids_are_rejected():
    base, ours, _ = fork(TURN, TURN, [])
    theirs = json.loads(json.dumps(ours))
    theirs["nodes"]["o2"]["message"] = "another"
    for pair in ((ours, theirs), (theirs, ours)):
        with pytest.raises(InvalidHistoryError, match="unique") as caught:
            merge(base, *pair)
        assert caught.value.node_id == "o2"
    edited = json.loads(json.dumps(base))
    edited["nodes"]["b2"]["message"] = "edited in place"
    for pair in ((ours, edited), (edited, ours)):
        assert merge(base, *pair)["nodes"]["b2"]["message"] == "edited in place"


def test_moved_node_has_one_parent():
    base, ours, _ = fork([("append", 0), ("append", 0), ("add_root", 0)], [("append", 0)], [])
    theirs = json.loads(json.dumps(base))
    theirs["nodes"]["b2"]["parentId"] = "b3"
    theirs["nodes"]["b1"]["children"] = []
    theirs["nodes"]["b3"]["children"] = ["b2"]
    merged = merge(base, ours, validate_document(theirs))
    assert links(merged) == {None: ["b1", "b3"], "b1": [], "b3": ["b2", "o1"], "b2": [], "o1": []}


def test_nodes_moved_below_each_other_are_separated():
    base, _, _ = fork([("append", 0), ("add_root", 0)], [], [])
    ours, theirs = (json.loads(json.dumps(base)) for _ in range(2))
    for side, above, below in ((ours, "b1", "b2"), (theirs, "b2", "b1")):
        side["nodes"][below]["parentId"] = above
        side["nodes"][above]["children"] = [below]
        side["rootIds"] = [above]
        validate_document(side)
    for pair in ((ours, theirs), (theirs, ours)):
        merged = merge(base, *pair)
        validate_document(merged)
        assert set(merged["nodes"]) == {"b1", "b2"}
    assert without_active_leaf(merge(base, ours, theirs)) == without_active_leaf(merge(base, theirs, ours))


@pytest.mark.parametrize("level", ["document", "node"])
def test_unknown_fields_are_merged(level):
    def put(document, **more):
        copy = json.loads(json.dumps(document))
        (copy if level == "document" else copy["nodes"]["b1"]).update(more)
        return copy

    base, ours, theirs = fork(TURN, TURN, TURN)
    base = put(base, title="old", gone=1)
    merged = merge(base, put(ours, title="old", gone=1), put(theirs, title="new"))
    found = merged if level == "document" else merged["nodes"]["b1"]
    assert found["title"] == "new"
    assert "gone" not in found
    added = merge(base, put(ours, title="old", reactions=1), put(theirs, title="old", pinned=True))
    found = added if level == "document" else added["nodes"]["b1"]
    assert (found["reactions"], found["pinned"]) == (1, True)
    both = [merge(base, put(ours, title=a), put(theirs, title=b)) for a, b in (("x", "y"), ("y", "x"))]
    titles = [(each if level == "document" else each["nodes"]["b1"])["title"] for each in both]
    assert titles[0] == titles[1]


def test_siblings_are_sorted_by_age():
    base = changed(EMPTY, [("append", 0, 0)], "b")
    ours = changed(base, [("append", 0, 2), ("edit", 1, 3)], "o")
    theirs = changed(base, [("append", 0, 1), ("edit", 1, 3)], "t")
    merged = merge(*map(json.loads, (base, ours, theirs)))
    assert links(merged)["b1"] == ["t1", "o1", "o2", "t2"]
