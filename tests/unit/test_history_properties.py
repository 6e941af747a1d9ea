"""Random operations on a history: the tree stays valid, survives JSON, and matches a simple model."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.histories import HISTORIES, JSON_VALUES

from aibind_postgres import ChatHistory, MessageTree


class Histories(RuleBasedStateMachine):
    """Compares a `ChatHistory` with a dict of its messages in order of creation."""

    def __init__(self):
        super().__init__()
        self.chat = ChatHistory()
        self.model = {}  # id: (parent, message, metadata), oldest first
        self.active = None

    def children(self, parent):
        return [id for id, (above, *_) in self.model.items() if above == parent]

    def siblings(self, id):
        return self.children(self.model[id][0])

    def first_leaf(self, id):
        while children := self.children(id):
            id = children[0]
        return id

    def subtree(self, id):
        return {id}.union(*(self.subtree(child) for child in self.children(id)))

    def path(self, id):
        return [] if id is None else [*self.path(self.model[id][0]), id]

    def add(self, id, parent, message, metadata=None, *, active=True):
        assert id not in self.model
        self.model[id] = (parent, message, metadata or {})
        if active:
            self.active = id

    not_empty = precondition(lambda self: self.model)
    indexes = st.integers(0, 50)

    def id_at(self, index):
        return list(self.model)[index % len(self.model)]

    @rule(message=JSON_VALUES, metadata=st.none() | st.dictionaries(st.text(), JSON_VALUES, max_size=2))
    def append(self, message, metadata):
        self.add(self.chat.append(message, metadata), self.active, message, metadata)

    @rule(message=JSON_VALUES)
    def add_root(self, message):
        self.add(self.chat.tree.add_root(message), None, message)

    @not_empty
    @rule(index=indexes, message=JSON_VALUES, edits=st.booleans())
    def edit_or_regenerate(self, index, message, edits):
        id = self.id_at(index)
        self.add((self.chat.edit if edits else self.chat.regenerate)(id, message), self.model[id][0], message)

    @not_empty
    @rule(index=indexes, message=JSON_VALUES, active=st.booleans())
    def add_child_or_branch(self, index, message, active):
        id = self.id_at(index)
        add = self.chat.tree.branch if active else self.chat.tree.add_child
        self.add(add(id, message), id, message, active=active)

    @not_empty
    @rule(index=indexes)
    def set_active_leaf(self, index):
        self.active = self.chat.tree.set_active_leaf(self.id_at(index))

    @not_empty
    @rule(index=indexes, step=st.sampled_from([1, -1]))
    def switch_alternative(self, index, step):
        id = self.id_at(index)
        siblings = self.siblings(id)
        position = siblings.index(id) + step
        target = self.first_leaf(siblings[position]) if 0 <= position < len(siblings) else None
        assert (self.chat.next_alternative if step > 0 else self.chat.prev_alternative)(id) == target
        self.active = target or self.active

    @not_empty
    @rule(index=indexes)
    def remove(self, index):
        id = self.id_at(index)
        parent, removed = self.model[id][0], self.subtree(id)
        self.chat.tree.remove(id)
        self.model = {other: node for other, node in self.model.items() if other not in removed}
        if self.active in removed:
            left = self.children(parent)
            self.active = self.first_leaf(left[-1]) if left else parent

    @rule(message=JSON_VALUES)
    def compact(self, message):
        id = self.chat.compact(message)
        self.model = {}
        self.add(id, None, message, self.chat.tree.get(id).metadata)

    @rule()
    def save_and_load(self):
        self.chat = ChatHistory.from_json(self.chat.to_json())

    @invariant()
    def history_matches_model(self):
        chat, tree = self.chat, self.chat.tree
        path = self.path(self.active)
        assert tree.active_leaf_id == self.active
        assert chat.node_ids == path
        assert chat.messages == [self.model[id][1] for id in path]
        assert len(chat) == len(tree) == len(self.model)
        assert chat.is_empty == (not self.model)
        assert list(tree.root_ids) == self.children(None)
        assert {leaf.id for leaf in tree.leaves()} == {id for id in self.model if not self.children(id)}
        for id, (parent, message, metadata) in self.model.items():
            node, siblings = tree.get(id), self.siblings(id)
            assert (node.parent_id, node.message, node.metadata) == (parent, message, metadata)
            assert list(node.children) == self.children(id)
            assert chat.alternative_count(id) == len(siblings)
            assert chat.alternative_index(id) == siblings.index(id)
            assert chat.has_alternatives(id) == (len(siblings) > 1)
            assert tree.path_to(id).node_ids == self.path(id)
            assert tree.depth(id) == len(self.path(id)) - 1

    @invariant()
    def json_round_trip(self):
        text = self.chat.to_json()
        again = ChatHistory.from_json(text)
        assert again.to_json() == text
        assert again.tree.serialize() == self.chat.tree.serialize() == json.loads(text)


TestHistories = Histories.TestCase


@given(HISTORIES, st.data())
def test_unknown_fields_are_preserved(text, data):
    document = json.loads(text)
    for fields in (document, *document["nodes"].values()):
        for key, value in data.draw(st.dictionaries(st.text(), JSON_VALUES, max_size=2)).items():
            fields.setdefault(key, value)
    assert MessageTree.deserialize(document).serialize() == document
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    assert ChatHistory.from_json(text).to_json() == text
