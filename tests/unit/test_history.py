"""`MessageTree` and `ChatHistory`: the operations and their errors."""

from __future__ import annotations

import copy
import pickle
import re
from dataclasses import FrozenInstanceError
from itertools import count

import pytest

from aibind_postgres import ChatHistory, InvalidDataError, MessageNotFoundError, MessageTree


@pytest.fixture
def chat():
    """A question `a` with the answers `b` and `c`; `c` is the active leaf."""
    chat = ChatHistory(generate_id=iter("abcdefgh").__next__)
    chat.append("question")
    chat.append("answer")
    chat.regenerate("b", "another answer")
    return chat


@pytest.fixture
def tree(chat):
    return chat.tree


def test_new_history_is_empty():
    chat = ChatHistory()
    assert (chat.messages, chat.node_ids, len(chat), chat.is_empty) == ([], [], 0, True)
    assert (chat.tree.active_leaf_id, chat.tree.root_ids, chat.tree.leaves()) == (None, (), [])
    assert chat.tree.serialize() == {"version": 1, "nodes": {}, "rootIds": [], "activeLeafId": None}


def test_append():
    chat = ChatHistory()
    first = chat.append({"role": "user", "content": "Hello"})
    second = chat.append({"role": "assistant", "content": "Hi!"}, {"model": "m"})
    assert chat.messages == [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]
    assert chat.node_ids == [first, second]
    assert (len(chat), chat.is_empty, bool(chat)) == (2, False, True)
    node = chat.tree.get(second)
    assert (node.id, node.parent_id, node.children, node.metadata) == (second, first, (), {"model": "m"})
    assert chat.tree.get(first).metadata == {}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", node.created_at)


def test_ids_are_random_unless_generate_id_is_given():
    ids = {ChatHistory().append("x") for _ in range(100)}
    assert len(ids) == 100
    assert all(len(id) == 36 for id in ids)
    numbers = count()
    chat = ChatHistory(generate_id=lambda: f"m{next(numbers)}")
    assert [chat.append("x"), chat.append("y")] == ["m0", "m1"]
    again = ChatHistory.from_json(chat.to_json(), generate_id=lambda: "mine")
    assert again.append("z") == "mine"
    assert MessageTree.deserialize(again.tree.serialize(), generate_id=lambda: "other").append("z") == "other"


@pytest.mark.parametrize("new_id", ["a", "", None, 3, ["x"]])
def test_generated_id_must_be_a_new_str(new_id):
    chat = ChatHistory(generate_id=iter(["a", new_id, "b"]).__next__)
    chat.append("x")
    with pytest.raises(InvalidDataError, match="generate_id"):
        chat.append("y")
    assert (len(chat), chat.messages) == (1, ["x"])
    assert chat.append("z") == "b"


def test_edit_and_regenerate_add_alternatives(chat):
    assert chat.messages == ["question", "another answer"]
    assert chat.edit("a", "other question") == "d"
    assert chat.messages == ["other question"]
    assert chat.tree.root_ids == ("a", "d")
    assert chat.edit("b", "third answer") == "e"
    assert chat.messages == ["question", "third answer"]
    assert chat.tree.get("a").children == ("b", "c", "e")
    assert [chat.alternative_index(id) for id in "bce"] == [0, 1, 2]
    assert {chat.alternative_count(id) for id in "bce"} == {3}
    assert chat.has_alternatives("a")
    assert chat.has_alternatives("d")


def test_single_message_has_no_alternatives(chat):
    chat.append("more")
    assert not chat.has_alternatives("d")
    assert (chat.alternative_count("d"), chat.alternative_index("d")) == (1, 0)
    assert chat.next_alternative("d") is None
    assert chat.prev_alternative("d") is None


def test_switching_alternatives_follows_first_children_to_a_leaf(chat):
    tree = chat.tree
    tree.add_child("b", "b's first")
    tree.add_child("b", "b's second")
    tree.add_child("d", "below the first")
    assert chat.prev_alternative("c") == "f"
    assert chat.node_ids == ["a", "b", "d", "f"]
    assert chat.prev_alternative("b") is None
    assert chat.next_alternative("b") == "c"
    assert chat.next_alternative("c") is None
    assert chat.node_ids == ["a", "c"]


def test_compact_leaves_one_message(chat):
    chat.edit("a", "another root")
    id = chat.compact("summary")
    assert (chat.messages, chat.node_ids, len(chat)) == (["summary"], [id], 1)
    metadata = chat.tree.get(id).metadata
    assert metadata["compacted"] is True
    assert metadata["compactedAt"].endswith("Z")
    empty = ChatHistory()
    empty.compact("nothing")
    assert empty.messages == ["nothing"]


def test_invalid_summary_changes_nothing(chat):
    before = chat.to_json()
    with pytest.raises(InvalidDataError):
        chat.compact(object())
    assert chat.to_json() == before


def test_add_root_add_child_and_branch(tree):
    assert tree.add_root("second root", {"n": 1}) == "d"
    assert (tree.root_ids, tree.active_leaf_id) == (("a", "d"), "d")
    assert tree.add_child("a", "third answer", {"n": 2}) == "e"
    assert tree.active_leaf_id == "d"
    assert tree.branch("e", "more", {"n": 3}) == "f"
    assert (tree.active_leaf_id, tree.active_path.node_ids) == ("f", ["a", "e", "f"])
    assert [tree.get(id).metadata for id in "def"] == [{"n": 1}, {"n": 2}, {"n": 3}]
    assert tree.append("below", {"n": 4}) == "g"
    assert tree.get("g").parent_id == "f"


def test_paths_siblings_leaves_and_depth(tree):
    assert (tree.path_to("b").messages, tree.path_to("b").node_ids) == (["question", "answer"], ["a", "b"])
    assert [tree.depth(id) for id in "abc"] == [0, 1, 1]
    nodes, index = tree.siblings("c")
    assert ([node.id for node in nodes], index) == (["b", "c"], 1)
    nodes, index = tree.siblings("a")
    assert ([node.id for node in nodes], index) == (["a"], 0)
    assert [leaf.id for leaf in tree.leaves()] == ["b", "c"]
    assert "a" in tree
    assert "z" not in tree
    assert tree.get("z") is None


def test_any_node_can_be_the_active_leaf(tree):
    assert tree.set_active_leaf("a") == "a"
    assert tree.active_path.messages == ["question"]
    assert tree.append("third answer") == "d"
    assert tree.get("a").children == ("b", "c", "d")


def test_next_and_prev_sibling(tree):
    assert tree.prev_sibling("c") == "b"
    assert tree.active_leaf_id == "b"
    assert tree.prev_sibling("b") is None
    assert tree.next_sibling("b") == "c"
    assert tree.next_sibling("c") is None
    assert tree.active_leaf_id == "c"


def test_remove_includes_descendants_and_moves_the_active_leaf(tree):
    tree.append("below c")
    tree.add_child("b", "below b")
    tree.remove("c")
    assert tree.active_leaf_id == "e"
    assert sorted(tree.serialize()["nodes"]) == ["a", "b", "e"]
    tree.set_active_leaf("b")
    tree.remove("e")
    assert tree.active_leaf_id == "b"
    tree.remove("b")
    assert (tree.active_leaf_id, tree.get("a").children) == ("a", ())
    tree.add_root("another root")
    tree.remove("f")
    assert tree.active_leaf_id == "a"
    tree.remove("a")
    assert (tree.active_leaf_id, tree.root_ids, tree.is_empty) == (None, (), True)
    tree.append("new")
    tree.clear()
    assert (tree.active_leaf_id, tree.root_ids, len(tree)) == (None, (), 0)


@pytest.mark.parametrize(
    "call",
    [
        lambda chat: chat.edit("z", "x"),
        lambda chat: chat.regenerate("z", "x"),
        lambda chat: chat.has_alternatives("z"),
        lambda chat: chat.alternative_count("z"),
        lambda chat: chat.alternative_index("z"),
        lambda chat: chat.next_alternative("z"),
        lambda chat: chat.prev_alternative("z"),
        lambda chat: chat.tree.add_child("z", "x"),
        lambda chat: chat.tree.branch("z", "x"),
        lambda chat: chat.tree.path_to("z"),
        lambda chat: chat.tree.siblings("z"),
        lambda chat: chat.tree.next_sibling("z"),
        lambda chat: chat.tree.set_active_leaf("z"),
        lambda chat: chat.tree.depth("z"),
        lambda chat: chat.tree.remove("z"),
    ],
)
def test_missing_message_raises_with_its_id(chat, call):
    before = chat.to_json()
    with pytest.raises(MessageNotFoundError, match="'z'") as caught:
        call(chat)
    assert caught.value.node_id == "z"
    assert isinstance(caught.value, LookupError)
    assert chat.to_json() == before


CIRCULAR: list = []
CIRCULAR.append(CIRCULAR)
DEEP: list = []
for _ in range(5000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    "value",
    [
        b"bytes",
        {1: "x"},
        {"a": {None: 1}},
        ("a",),
        {"a", "b"},
        float("nan"),
        -float("inf"),
        10**5000,
        object(),
        [{"x": b""}],
    ],
    ids=lambda value: repr(type(value)),
)
def test_non_json_values_are_rejected(chat, value):
    before = chat.to_json()
    for call in (chat.append, chat.compact, chat.tree.add_root, lambda value: chat.append("x", {"key": value})):
        with pytest.raises(InvalidDataError, match="not a JSON value"):
            call(value)
    assert chat.to_json() == before


@pytest.mark.parametrize("metadata", [5, "ab", [("a", 1)], b""])
def test_metadata_must_be_a_dict(chat, metadata):
    with pytest.raises(InvalidDataError, match="metadata"):
        chat.append("x", metadata)
    assert len(chat) == 3


@pytest.mark.parametrize("value", [CIRCULAR, DEEP])
def test_too_deep_values_are_rejected(chat, value):
    with pytest.raises(InvalidDataError, match="200 levels"):
        chat.append(value)
    assert len(chat) == 3


def test_maximum_depth_round_trip(chat):
    value = "bottom"
    for _ in range(200):
        value = {"x": value}
    chat.append(value)
    again = ChatHistory.from_json(chat.to_json())
    assert again.messages == MessageTree.deserialize(again.tree.serialize()).active_path.messages == chat.messages
    assert chat.messages[-1] == value


def test_arguments_and_results_are_copies(chat):
    message, metadata = {"content": ["x"]}, {"tags": ["t"]}
    id = chat.append(message, metadata)
    before = chat.to_json()
    message["content"].append("y")
    metadata["tags"].append("u")
    chat.messages[-1]["content"].append("y")
    chat.messages.append("z")
    chat.node_ids.append("z")
    node = chat.tree.get(id)
    node.message["content"].clear()
    node.metadata["tags"].clear()
    chat.tree.serialize()["nodes"].clear()
    chat.tree.siblings(id)[0].clear()
    chat.tree.path_to(id).messages[-1].clear()
    with pytest.raises(FrozenInstanceError):
        node.message = "other"
    assert chat.to_json() == before
    assert chat.messages[-1] == {"content": ["x"]}


def test_deepcopy_and_pickle(chat):
    before = chat.to_json()
    for copied in (copy.deepcopy(chat), pickle.loads(pickle.dumps(ChatHistory.from_json(before)))):
        assert copied.to_json() == before
        if copied.tree.next_sibling("b"):
            copied.tree.remove("b")
        assert chat.to_json() == before


def test_append_after_rewind_adds_an_alternative() -> None:
    chat: ChatHistory[str] = ChatHistory()
    first = chat.append("first")
    second = chat.append("second")
    chat.tree.rewind(second)
    assert chat.messages == ["first"]
    other = chat.append("other second")
    assert chat.tree.siblings(other)[1] == 1
    chat.tree.rewind(first)
    assert (chat.messages, chat.tree.active_leaf_id) == ([], None)
    loaded: ChatHistory[str] = ChatHistory.from_json(chat.to_json())
    assert loaded.messages == []
    loaded.append("other first")
    assert (loaded.messages, loaded.tree.root_ids[0]) == (["other first"], first)
    with pytest.raises(MessageNotFoundError):
        chat.tree.rewind("nothing")
