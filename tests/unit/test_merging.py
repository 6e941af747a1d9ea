"""The three-way merge: what it promises, for whatever two have done, and what it does in the usual cases."""

from __future__ import annotations

import json

import pytest
from hypothesis import assume, event, given, settings
from support.histories import EMPTY, FORKS, HISTORIES, changed

from aibind_postgres import InvalidHistoryError
from aibind_postgres._document import valid_document
from aibind_postgres._merging import merge


def but_for_the_active_leaf(document):
    return json.dumps({**document, "activeLeafId": None})  # with the order of all keys


def end_of(side, kept):
    """Return the active leaf, or what is kept of the nodes above it."""
    id = side["activeLeafId"]
    while id is not None and id not in kept:
        id = side["nodes"][id]["parentId"]
    return id


@given(FORKS)
def test_what_is_added_stays_and_what_is_removed_goes(fork):
    base, ours, theirs = (set(document["nodes"]) for document in fork)
    merged = merge(*fork)
    assert set(merged["nodes"]) == (ours | theirs) - (base - ours) - (base - theirs)


@given(FORKS)
def test_what_comes_out_is_a_valid_tree_of_the_same_messages(fork):
    _, ours, theirs = fork
    merged = merge(*fork)
    assert valid_document(merged) == merged
    written = {**ours["nodes"], **theirs["nodes"]}
    links = {"parentId": None, "children": None}
    for id, node in merged["nodes"].items():
        assert {**node, **links} == {**written[id], **links}


@given(FORKS)
def test_who_is_called_first_makes_no_difference_but_for_the_active_leaf(fork):
    base, ours, theirs = fork
    assert but_for_the_active_leaf(merge(base, ours, theirs)) == but_for_the_active_leaf(merge(base, theirs, ours))


@given(FORKS)
def test_merging_equal_trees_changes_nothing(fork):
    base, ours, _ = fork
    for pair in ((base, ours, ours), (ours, ours, ours), (json.loads(EMPTY), ours, ours)):
        assert json.dumps(merge(*pair)) == json.dumps(ours)


@given(FORKS)
def test_who_has_changed_nothing_gets_what_the_other_has(fork):
    base, ours, _ = fork
    assert json.dumps(merge(base, ours, base)) == json.dumps(merge(base, base, ours)) == json.dumps(ours)


@settings(max_examples=500)
@given(FORKS)
def test_a_node_stays_below_its_parent_or_comes_to_the_end_of_the_side_that_removed_it(fork):
    _, ours, theirs = fork
    merged = merge(*fork)
    kept = merged["nodes"]
    made_roots = 0
    for side, other in ((ours, theirs), (theirs, ours)):
        for id, node in side["nodes"].items():
            if id not in kept:
                continue
            if node["parentId"] is None or node["parentId"] in kept:
                assert kept[id]["parentId"] == node["parentId"]
            elif kept[id]["parentId"] is not None:
                event("hung below the other side's end")
                assert kept[id]["parentId"] == end_of(other, kept)
            elif end_of(other, kept) is not None:
                made_roots += 1
    if made_roots:
        # Only where both have hung their own below what the other one has, and that is one ring.
        event("made a root")
        assert made_roots == 1
        assert all(side["nodes"].keys() - kept.keys() for side in (ours, theirs))


@given(FORKS)
def test_siblings_keep_the_order_of_both_sides(fork):
    merged = merge(*fork)
    for side in fork[1:]:
        for parent, found in [(None, merged["rootIds"]), *((id, n["children"]) for id, n in merged["nodes"].items())]:
            children = side["rootIds"] if parent is None else side["nodes"].get(parent, {}).get("children", [])
            here = [id for id in children if id in found]
            assert [id for id in found if id in here] == here


@given(FORKS)
def test_the_active_leaf_of_the_side_that_saves_wins_if_it_has_moved(fork):
    base, ours, theirs = fork
    merged = merge(*fork)
    kept = merged["nodes"]
    moved = ours["activeLeafId"] != base["activeLeafId"]
    first, second = (ours, theirs) if moved else (theirs, ours)
    assert merged["activeLeafId"] == (end_of(first, kept) or end_of(second, kept))
    if moved and ours["activeLeafId"] in kept:
        assert merged["activeLeafId"] == ours["activeLeafId"]


@given(HISTORIES, HISTORIES)
def test_without_a_common_base_all_of_both_is_there(ours, theirs):
    ours, theirs = json.loads(ours), json.loads(theirs.replace('"b', '"t'))
    assume(ours != theirs)
    assert set(merge(json.loads(EMPTY), ours, theirs)["nodes"]) == set(ours["nodes"]) | set(theirs["nodes"])


@settings(max_examples=500)
@given(FORKS)
def test_another_merge_with_the_same_changes_nothing(fork):
    # As a save does whose reply was lost, once it is made again.
    base, ours, theirs = fork
    once = merge(base, ours, theirs)
    again = merge(base, ours, once)
    assert {id: node["parentId"] for id, node in again["nodes"].items()} == {
        id: node["parentId"] for id, node in once["nodes"].items()
    }


def fork(base, ours, theirs):
    """Return three documents, made by steps such as ("append", 0)."""
    base = changed(EMPTY, [(*step, 0) for step in base], "b")
    sides = (changed(base, [(*step, 0) for step in steps], name) for steps, name in ((ours, "o"), (theirs, "t")))
    return tuple(map(json.loads, (base, *sides)))


def links(document):
    return {None: document["rootIds"], **{id: node["children"] for id, node in document["nodes"].items()}}


TURN = [("append", 0), ("append", 0)]


def test_two_tabs_at_once_give_two_branches():
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


def test_what_came_while_the_other_side_compacted_is_below_the_summary():
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


def test_what_was_deleted_meanwhile_does_not_come_back():
    base, ours, _ = fork(TURN, TURN, [])
    merged = merge(base, ours, json.loads(EMPTY))
    assert links(merged) == {None: ["o1"], "o1": ["o2"], "o2": []}
    assert merged["activeLeafId"] == "o2"
    assert merge(base, base, json.loads(EMPTY)) == json.loads(EMPTY)


def test_both_have_removed_what_the_other_one_has_built_on():
    # Two roots; each side removes one of them and adds to the other.
    merged = merge(
        *fork(
            [("append", 0), ("add_root", 0)],
            [("add_child", 0), ("remove", 1), ("go_to", 1)],
            [("add_child", 1), ("remove", 0), ("go_to", 1)],
        )
    )
    assert links(merged) == {None: ["o1"], "o1": ["t1"], "t1": []}


def test_of_a_ring_one_link_is_cut_and_it_is_not_one_that_was_written():
    base, *_ = fork([("append", 0), ("add_root", 0)], [], [])

    def side(removed, *written):
        """Return what is left without a root, with a chain of nodes below the other one, the last one active."""
        document = json.loads(json.dumps(base))
        del document["nodes"][removed]
        [root] = document["rootIds"] = [id for id in document["rootIds"] if id != removed]
        for parent, id in zip((root, *written[:-1]), written, strict=True):
            document["nodes"][parent]["children"].append(id)
            document["nodes"][id] = {"id": id, "message": id, "parentId": parent, "children": []}
        return valid_document({**document, "activeLeafId": written[-1]})

    # In the order of the ids, the first ones are a node below its own parent, and one that is not in the ring.
    ours, theirs = side("b2", "o2", "o1"), side("b1", "t2", "t1")
    ours["nodes"]["b1"]["children"].append("n")
    ours["nodes"]["n"] = {"id": "n", "message": "n", "parentId": "b1", "children": []}
    for pair in ((ours, theirs), (theirs, ours)):
        merged = merge(base, *pair)
        assert links(merged) == {None: ["o2"], "o2": ["o1"], "o1": ["t2"], "t2": ["t1"], "t1": ["n"], "n": []}


def test_two_messages_of_one_id_are_refused():
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


def test_a_moved_node_is_where_it_was_moved_to_and_only_there():
    base, ours, _ = fork([("append", 0), ("append", 0), ("add_root", 0)], [("append", 0)], [])
    theirs = json.loads(json.dumps(base))
    theirs["nodes"]["b2"]["parentId"] = "b3"
    theirs["nodes"]["b1"]["children"] = []
    theirs["nodes"]["b3"]["children"] = ["b2"]
    merged = merge(base, ours, valid_document(theirs))
    assert links(merged) == {None: ["b1", "b3"], "b1": [], "b3": ["b2", "o1"], "b2": [], "o1": []}


def test_nodes_that_were_moved_below_each_other_are_cut_apart():
    base, _, _ = fork([("append", 0), ("add_root", 0)], [], [])
    ours, theirs = (json.loads(json.dumps(base)) for _ in range(2))
    for side, above, below in ((ours, "b1", "b2"), (theirs, "b2", "b1")):
        side["nodes"][below]["parentId"] = above
        side["nodes"][above]["children"] = [below]
        side["rootIds"] = [above]
        valid_document(side)
    for pair in ((ours, theirs), (theirs, ours)):
        merged = merge(base, *pair)
        valid_document(merged)
        assert set(merged["nodes"]) == {"b1", "b2"}
    assert but_for_the_active_leaf(merge(base, ours, theirs)) == but_for_the_active_leaf(merge(base, theirs, ours))


@pytest.mark.parametrize("place", ["document", "node"])
def test_unknown_keys_are_merged_too(place):
    def put(document, **more):
        copy = json.loads(json.dumps(document))
        (copy if place == "document" else copy["nodes"]["b1"]).update(more)
        return copy

    base, ours, theirs = fork(TURN, TURN, TURN)
    base = put(base, title="old", gone=1)
    merged = merge(base, put(ours, title="old", gone=1), put(theirs, title="new"))
    found = merged if place == "document" else merged["nodes"]["b1"]
    assert found["title"] == "new"
    assert "gone" not in found
    added = merge(base, put(ours, title="old", reactions=1), put(theirs, title="old", pinned=True))
    found = added if place == "document" else added["nodes"]["b1"]
    assert (found["reactions"], found["pinned"]) == (1, True)
    both = [merge(base, put(ours, title=a), put(theirs, title=b)) for a, b in (("x", "y"), ("y", "x"))]
    titles = [(each if place == "document" else each["nodes"]["b1"])["title"] for each in both]
    assert titles[0] == titles[1]


def test_an_older_answer_comes_before_a_newer_one():
    base = changed(EMPTY, [("append", 0, 0)], "b")
    ours = changed(base, [("append", 0, 2), ("edit", 1, 3)], "o")
    theirs = changed(base, [("append", 0, 1), ("edit", 1, 3)], "t")
    merged = merge(*map(json.loads, (base, ours, theirs)))
    assert links(merged)["b1"] == ["t1", "o1", "o2", "t2"]
