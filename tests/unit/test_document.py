"""The document of a conversation: what is taken, what is refused, and that nothing in it changes on its way through."""

from __future__ import annotations

import json
import sys

import pytest

from aibind_postgres import ChatHistory, InvalidHistoryError, MessageTree

# As JSON.stringify writes it on the TypeScript side, with keys that are unknown here, and an order of their own.
WRITTEN_ELSEWHERE = (
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


def test_a_document_from_elsewhere_comes_back_to_the_letter():
    assert ChatHistory.from_json(WRITTEN_ELSEWHERE).to_json() == WRITTEN_ELSEWHERE
    data = json.loads(WRITTEN_ELSEWHERE)
    assert MessageTree.deserialize(data).serialize() == data


def test_what_is_unknown_survives_changes():
    chat = ChatHistory.from_json(WRITTEN_ELSEWHERE)
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


def test_a_document_of_ours_has_what_the_other_side_needs():
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
    "no object": ([], None, "version 1"),
    "another version": ({**VALID, "version": 2}, None, "version 1"),
    "no version": ({key: value for key, value in VALID.items() if key != "version"}, None, "version 1"),
    "a version that is a truth": ({**VALID, "version": True}, None, "version 1"),
    "nodes in a list": ({**VALID, "nodes": []}, None, "nodes"),
    "no roots": ({**VALID, "rootIds": None}, None, "rootIds"),
    "roots that are no ids": ({**VALID, "rootIds": [1]}, None, "rootIds"),
    "no active leaf": ({key: value for key, value in VALID.items() if key != "activeLeafId"}, None, "activeLeafId"),
    "a missing active leaf": ({**VALID, "activeLeafId": "z"}, "z", "active leaf"),
    "an active leaf that is no id": ({**VALID, "activeLeafId": ["a"]}, None, "activeLeafId"),
    "a missing root": (document(node("a"), roots=["a", "z"]), "z", "a root, and missing"),
    "a missing parent": (document(node("a"), node("b", "z")), "b", "parent, 'z', is missing"),
    "a missing child": (document(node("a", None, ["z"])), "a", "child, 'z', is missing"),
    "another parent": (document(node("a", None, ["b"]), node("b", None), roots=["a", "b"]), "b", "not its parent"),
    "a root with a parent": (document(node("a", None, ["b"]), node("b", "a"), roots=["a", "b"]), "b", "not its parent"),
    "a child listed twice": (document(node("a", None, ["b", "b"]), node("b", "a")), "b", "twice"),
    "a child that is not listed": (document(node("a"), node("b", "a")), "b", "not listed"),
    "a root that is not listed": (document(node("a"), node("b")), "b", "not listed"),
    "a cycle": (document(node("a"), node("b", "c", ["c"]), node("c", "b", ["b"])), "b", "cycle"),
    "a parent of itself": (document(node("a"), node("b", "b", ["b"])), "b", "cycle"),
    "below what is not listed": (document(node("a"), node("c", "b"), node("b", None, ["c"])), "c", "not listed"),
    "a node that is no object": ({**VALID, "nodes": {"a": None}}, "a", "object"),
    "a node of another id": ({**VALID, "nodes": {"a": node("b")}}, "a", "own id"),
    "children that are no list": (document({**node("a"), "children": "b"}), "a", "children"),
    "no children": (document({**node("a"), "children": None}), "a", "children"),
    "no parentId": ({**VALID, "nodes": {"a": {"id": "a", "children": []}}}, "a", "parentId"),
    "a parentId that is no id": (document(node("a", 3)), "a", "parentId"),
    "metadata in a list": (document({**node("a"), "metadata": []}), "a", "metadata"),
    "a time that is no text": (document({**node("a"), "createdAt": 3}), "a", "createdAt"),
}


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_document_is_refused_by_the_name_of_its_node(name):
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
def test_what_is_no_document_at_all_is_refused_and_not_shown(text):
    with pytest.raises(InvalidHistoryError) as caught:
        ChatHistory.from_json(text)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("message", [float("inf"), [[]] * 2 + [b""]])
def test_a_message_that_json_cannot_hold_is_the_fault_of_its_node(message):
    with pytest.raises(InvalidHistoryError, match="'a'"):
        MessageTree.deserialize(document({**node("a"), "message": message}))


def test_keys_that_may_be_missing_on_the_other_side_are_not_needed():
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
