"""The document of a conversation: validation, errors, and exact round trips."""

from __future__ import annotations

import json
import sys

import pytest

from aibind_postgres import ChatHistory, InvalidHistoryError, MessageTree
from aibind_postgres._concurrency import LARGE
from aibind_postgres._document import BATCH_NODES, copy_document, estimated_size, serialize_document

# The output of JSON.stringify in TypeScript, with unknown fields and a different order of keys.
FOREIGN_DOCUMENT = (
    '{"version":1,"nodes":{"q":{"id":"q",'
    '"message":{"role":"user","content":"Zwölf \\ud83d 👩‍👩‍👧 \\u0000\\u0001 \\" \\\\ / \u2028"},'
    '"parentId":null,"children":["a2","a1"],"metadata":{"n":[1,2.5,1e+21,-0.125,12345678901234567890,true,null]},'
    '"createdAt":"2026-03-10T08:30:51.007Z"},'
    '"a2":{"reactions":{"👍":2},"createdAt":"2026-03-10T08:30:53.000Z","id":"a2","message":null,"parentId":"q",'
    '"children":[],"metadata":{}},'
    '"a1":{"id":"a1","message":"","parentId":"q","children":[],"metadata":{},"createdAt":"2026-03-10T08:30:52.000Z"},'
    '"__proto__":{"id":"__proto__","message":0,"parentId":null,"children":[],"metadata":{},"createdAt":"x"}},'
    '"rootIds":["q","__proto__"],"activeLeafId":"a1","title":"Zwölf","more":{"b":1,"a":2}}'
)


def test_foreign_document_round_trip_is_exact():
    assert ChatHistory.from_json(FOREIGN_DOCUMENT).to_json() == FOREIGN_DOCUMENT
    data = json.loads(FOREIGN_DOCUMENT)
    assert MessageTree.deserialize(data).serialize() == data


def test_unknown_fields_survive_changes():
    chat = ChatHistory.from_json(FOREIGN_DOCUMENT)
    chat.append("more")
    chat.edit("q", "other")
    chat.next_alternative("a2")
    chat.tree.remove("a1")
    data = json.loads(chat.to_json())
    assert list(data["nodes"])[:3] == ["q", "a2", "__proto__"]
    assert data["nodes"]["a2"]["reactions"] == {"👍": 2}
    assert list(data["nodes"]["a2"])[:2] == ["reactions", "createdAt"]
    assert (data["title"], data["more"]) == ("Zwölf", {"b": 1, "a": 2})
    chat.compact("summary")
    assert json.loads(chat.to_json())["title"] == "Zwölf"


def test_new_documents_have_the_fields_of_the_typescript_package():
    chat = ChatHistory(generate_id=iter("ab").__next__)
    chat.append({"role": "user", "content": "é\udc00"})
    chat.append({"role": "assistant", "content": "\0"})
    text = chat.to_json()
    text.encode()
    assert "\0" not in text
    data = json.loads(text)
    assert list(data) == ["version", "nodes", "rootIds", "activeLeafId"]
    assert list(data["nodes"]["a"]) == ["id", "message", "parentId", "children", "metadata", "createdAt"]
    assert (
        ChatHistory.from_json(text).messages
        == chat.messages
        == [
            {"role": "user", "content": "é\udc00"},
            {"role": "assistant", "content": "\0"},
        ]
    )


def node(id, parent=None, children=(), **more):
    return {"id": id, "message": "m", "parentId": parent, "children": list(children), "metadata": {}, **more}


def document(*nodes, roots=("a",), active="a", **more):
    return {"version": 1, "nodes": {n["id"]: n for n in nodes}, "rootIds": list(roots), "activeLeafId": active, **more}


VALID = document(node("a", None, ["b"]), node("b", "a"))

INVALID = {
    "not an object": ([], None, "version 1"),
    "another version": ({**VALID, "version": 2}, None, "version 1"),
    "no version": ({key: value for key, value in VALID.items() if key != "version"}, None, "version 1"),
    "a boolean version": ({**VALID, "version": True}, None, "version 1"),
    "nodes of another type": ({**VALID, "nodes": []}, None, "nodes"),
    "no roots": ({**VALID, "rootIds": None}, None, "rootIds"),
    "rootIds of other types": ({**VALID, "rootIds": [1]}, None, "rootIds"),
    "no active leaf": ({key: value for key, value in VALID.items() if key != "activeLeafId"}, None, "activeLeafId"),
    "a missing active leaf": ({**VALID, "activeLeafId": "z"}, "z", "active leaf"),
    "activeLeafId of another type": ({**VALID, "activeLeafId": ["a"]}, None, "activeLeafId"),
    "a missing root": (document(node("a"), roots=["a", "z"]), "z", "a root, but missing"),
    "a missing parent": (document(node("a"), node("b", "z")), "b", "parent 'z' is missing"),
    "a missing child": (document(node("a", None, ["z"])), "a", "child 'z' is missing"),
    "another parent": (document(node("a", None, ["b"]), node("b", None), roots=["a", "b"]), "b", "not its parent"),
    "a root with a parent": (document(node("a", None, ["b"]), node("b", "a"), roots=["a", "b"]), "b", "not its parent"),
    "a child listed twice": (document(node("a", None, ["b", "b"]), node("b", "a")), "b", "twice"),
    "an unlisted child": (document(node("a"), node("b", "a")), "b", "not listed"),
    "an unlisted root": (document(node("a"), node("b")), "b", "not listed"),
    "a cycle": (document(node("a"), node("b", "c", ["c"]), node("c", "b", ["b"])), "b", "cycle"),
    "a node that is its own parent": (document(node("a"), node("b", "b", ["b"])), "b", "cycle"),
    "below an unlisted node": (document(node("a"), node("c", "b"), node("b", None, ["c"])), "c", "not listed"),
    "a node that is not an object": ({**VALID, "nodes": {"a": None}}, "a", "object"),
    "a node with another id": ({**VALID, "nodes": {"a": node("b")}}, "a", "own id"),
    "children of another type": (document({**node("a"), "children": "b"}), "a", "children"),
    "no children": (document({**node("a"), "children": None}), "a", "children"),
    "no parentId": ({**VALID, "nodes": {"a": {"id": "a", "children": []}}}, "a", "parentId"),
    "parentId of another type": (document(node("a", 3)), "a", "parentId"),
    "metadata of another type": (document({**node("a"), "metadata": []}), "a", "metadata"),
    "createdAt of another type": (document({**node("a"), "createdAt": 3}), "a", "createdAt"),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_document_error_names_the_node(name):
    data, node_id, reason = INVALID[name]
    for call in (lambda: MessageTree.deserialize(data), lambda: ChatHistory.from_json(json.dumps(data))):
        with pytest.raises(InvalidHistoryError, match=reason) as caught:
            call()
        assert caught.value.node_id == node_id
        assert repr(node_id) in str(caught.value) or node_id is None
        assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        '"secret"',
        "secret",
        b"{}",
        None,
        "\ufeff{}",
        "\ud800",
        "[" * 100_000,
        '{"version": 1, "nodes": {}, "rootIds": [], "activeLeafId": null, "x": NaN}',
        '{"version": 1, "nodes": {}, "rootIds": [], "activeLeafId": null, "x": 1e999}',
        '{"version": 1, "nodes": {}, "rootIds": [], "activeLeafId": null, "x": ' + "[" * 300 + "]" * 300 + "}",
        '{"version": 1, "nodes": {}, "rootIds": [], "activeLeafId": null, "x": ' + "9" * 5000 + "}",
    ],
    ids=lambda text: repr(text)[-30:],
)
def test_invalid_text_is_rejected_and_not_shown(text):
    with pytest.raises(InvalidHistoryError) as caught:
        ChatHistory.from_json(text)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("message", [float("inf"), [[]] * 2 + [b""]])
def test_non_json_message_error_names_the_node(message):
    with pytest.raises(InvalidHistoryError, match="'a'"):
        MessageTree.deserialize(document({**node("a"), "message": message}))


def test_optional_fields_may_be_missing():
    bare = {"version": 1, "nodes": {"a": {"id": "a", "parentId": None, "children": []}}, "rootIds": ["a"]}
    tree = MessageTree.deserialize({**bare, "activeLeafId": None})
    found = tree.get("a")
    assert (found.message, found.metadata, found.created_at) == (None, {}, "")
    assert tree.serialize() == {**bare, "activeLeafId": None}
    assert tree.active_path.messages == []
    added = tree.append("a root, since nothing is active")
    assert tree.root_ids == ("a", added)


def test_ten_thousand_levels_and_ten_thousand_alternatives():
    deep, wide = ChatHistory(), ChatHistory()
    first = wide.append("first")
    for number in range(10_000):
        deep.append(number)
        wide.edit(first, number)
    assert sys.getrecursionlimit() < 5000
    for chat in (deep, wide):
        text = chat.to_json()
        again = ChatHistory.from_json(text)
        assert again.to_json() == text
        assert again.messages == chat.messages
        assert len(again) >= 10_000
    assert deep.messages == list(range(10_000))
    assert deep.tree.depth(deep.node_ids[-1]) == 9_999
    assert (wide.messages, wide.alternative_count(first), wide.alternative_index(first)) == ([9_999], 10_001, 0)
    assert wide.next_alternative(first) is not None
    deep.tree.remove(deep.node_ids[1])
    assert deep.messages == [0]
    wide.compact("summary")
    assert wide.messages == ["summary"]


def test_copy_of_a_document_does_not_change_with_its_tree():
    chat = ChatHistory(generate_id=iter("abcdef").__next__)
    for text in "xyz":
        chat.append(text)
    copied = copy_document(chat.tree._document)
    text = serialize_document(copied)
    chat.edit("b", "alternative")
    chat.edit("a", "another root")
    chat.tree.remove("b")
    chat.compact("short")
    assert serialize_document(copied) == text


@pytest.mark.parametrize("count", [0, 1, BATCH_NODES, BATCH_NODES + 1, 5 * BATCH_NODES])
def test_text_is_that_of_one_call_of_dumps(count):
    chat = ChatHistory()
    for number in range(count):
        chat.append({"role": "user", "content": f"é {number}"})
    assert chat.to_json() == json.dumps(chat.tree.serialize(), ensure_ascii=False, separators=(",", ":"))


@pytest.mark.parametrize("message", ["x" * LARGE, {"content": [{"text": "x" * LARGE}]}, ["x"] * LARGE])
def test_estimated_size_counts_nested_texts(message):
    chat = ChatHistory()
    chat.append("x")
    assert estimated_size(chat.tree._document) < LARGE
    chat.append(message)
    assert estimated_size(chat.tree._document) >= LARGE
