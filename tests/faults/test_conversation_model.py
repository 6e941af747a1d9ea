"""Conversation stores of both flavours on one table against one model: two holders of histories, three modes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from itertools import count

import psycopg
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from support.model import FLAVOURS, BothStores, Tables, open_both

from aibind_postgres import (
    AsyncPostgresConversationStore,
    ChatHistory,
    ConversationConflictError,
    PostgresConversationStore,
)

pytestmark = pytest.mark.timeout(1800)

SESSIONS = st.sampled_from(["s", "ü '; --"])
# Each holder has its own history, and uses the store of one flavour.
HOLDERS = st.sampled_from(FLAVOURS)
MODES = st.sampled_from(["merge", "merge", "raise", "overwrite"])
CHANGES = st.sampled_from(["append", "append", "edit", "root", "select", "remove", "remove"])


@dataclass
class HeldHistory:
    """A history, and the state that a store keeps for it."""

    chat: ChatHistory
    session: str | None = None
    base: str | None = None  # the stored text when it last equalled the history
    known: frozenset[str | None] = frozenset([None])  # texts that may be stored if no other writer was involved

    def under(self, session: str) -> HeldHistory:
        """Return the state for a session. Under another session, the history counts as new."""
        return self if self.session == session else HeldHistory(self.chat, session)


@dataclass
class Row:
    text: str
    expired: bool = False


def messages(text: str | None) -> dict[str, object]:
    """Return the messages of a document by node id."""
    nodes = {} if text is None else json.loads(text)["nodes"]
    return {node_id: node["message"] for node_id, node in nodes.items()}


class Conversations(RuleBasedStateMachine):
    def __init__(self, stores: BothStores, tables: Tables) -> None:
        super().__init__()
        self.stores = stores
        self.tables = tables
        self.rows: dict[str, Row] = {}
        self.numbers = count(1)
        self.held = {holder: HeldHistory(ChatHistory()) for holder in FLAVOURS}
        tables.run("DELETE FROM {conversations}")

    def current(self, session: str) -> str | None:
        row = self.rows.get(session)
        return None if row is None or row.expired else row.text

    def stored(self, session: str) -> str:
        [(text,)] = self.tables.run("SELECT data FROM {conversations} WHERE session_id = $1", session)
        return text

    def change_history(self, chat: ChatHistory, change: str, index: int) -> None:
        node_ids = list(chat.tree.serialize()["nodes"])
        message = {"number": next(self.numbers)}
        if change == "append" or not node_ids:
            chat.append(message)
            return
        node_id = node_ids[index % len(node_ids)]
        if change == "edit":
            chat.edit(node_id, message)
        elif change == "root":
            chat.tree.add_root(message)
        elif change == "select":
            chat.tree.set_active_leaf(node_id)
        else:
            chat.tree.remove(node_id)

    @rule(holder=HOLDERS, session=SESSIONS)
    def load(self, holder, session):
        chat = self.stores.call(holder, "load", session)
        current = self.current(session)
        assert chat.to_json() == (ChatHistory().to_json() if current is None else current)
        self.held[holder] = HeldHistory(chat, session, current, frozenset([current]))

    @rule(holder=HOLDERS, change=CHANGES, index=st.integers(0, 20))
    def change(self, holder, change, index):
        self.change_history(self.held[holder].chat, change, index)

    @rule(holder=HOLDERS, session=SESSIONS, mode=MODES)
    def save(self, holder, session, mode):
        held = self.held[holder].under(session)
        ours, current = held.chat.to_json(), self.current(session)
        unchanged = current in {*held.known, ours}
        self.held[holder] = held
        if mode == "raise" and not unchanged:
            with pytest.raises(ConversationConflictError) as caught:
                self.stores.call(holder, "save", session, held.chat, on_conflict=mode)
            assert caught.value.ours is held.chat
            assert messages(caught.value.theirs.to_json()) == messages(current)
            assert held.chat.to_json() == ours
            held.known |= {ours}
            return
        self.stores.call(holder, "save", session, held.chat, on_conflict=mode)
        stored = self.stored(session)
        if mode == "overwrite" or unchanged:
            assert stored == ours
        else:
            self.check_merge(held.base, ours, current, stored)
        assert held.chat.to_json() == stored
        self.rows[session] = Row(stored)
        held.base, held.known = stored, frozenset([stored])

    def check_merge(self, base: str | None, ours: str, theirs: str | None, merged: str) -> None:
        """Assert that additions are kept, removals are applied, and the result is a valid document."""
        base_messages, our_messages, their_messages = messages(base), messages(ours), messages(theirs)
        kept = {
            node_id: message
            for node_id, message in {**our_messages, **their_messages}.items()
            if (node_id in our_messages and node_id in their_messages) or node_id not in base_messages
        }
        assert messages(merged) == kept
        assert len(ChatHistory.from_json(merged)) == len(kept)

    @rule(holder=HOLDERS, session=SESSIONS, changes=st.lists(st.tuples(CHANGES, st.integers(0, 20)), max_size=3))
    def edit(self, holder, session, changes):
        """Load, change and save in one block, without a concurrent change."""
        current = self.current(session)
        store = self.stores.stores[holder]

        def body(chat):
            assert messages(chat.to_json()) == messages(current)
            for change, index in changes:
                self.change_history(chat, change, index)
            return chat.to_json()

        async def edit():
            async with store.edit(session) as chat:
                return body(chat)

        if holder == "async":
            text = self.stores.loop.run_until_complete(edit())
        else:
            with store.edit(session) as chat:
                text = body(chat)
        if text != (ChatHistory().to_json() if current is None else current):
            self.rows[session] = Row(text)

    @rule(session=SESSIONS, changes=st.tuples(*[st.lists(st.tuples(CHANGES, st.integers(0, 20)), max_size=3)] * 2))
    def both_change_the_same_conversation(self, session, changes):
        for holder in FLAVOURS:
            self.load(holder, session)
        for holder, steps in zip(FLAVOURS, changes, strict=True):
            for change, index in steps:
                self.change(holder, change, index)
        for holder in FLAVOURS:
            self.save(holder, session, "merge")

    @rule(session=SESSIONS)
    def expire(self, session):
        self.tables.run("UPDATE {conversations} SET expires_at = 0 WHERE session_id = $1", session)
        if session in self.rows:
            self.rows[session].expired = True

    @rule(holder=HOLDERS, session=SESSIONS)
    def touch(self, holder, session):
        assert self.stores.call(holder, "touch", session) is (self.current(session) is not None)

    @rule(holder=HOLDERS, session=SESSIONS)
    def delete(self, holder, session):
        assert self.stores.call(holder, "delete", session) is (self.current(session) is not None)
        self.rows.pop(session, None)

    @rule(holder=HOLDERS)
    def cleanup(self, holder):
        expired = [session for session, row in self.rows.items() if row.expired]
        assert self.stores.call(holder, "cleanup") == len(expired)
        for session in expired:
            del self.rows[session]

    @rule(holder=HOLDERS)
    def list(self, holder):
        listed = sorted(info.session_id for info in self.stores.call(holder, "list"))
        assert listed == sorted(session for session, row in self.rows.items() if not row.expired)

    @invariant()
    def table_matches_model(self):
        statement = "SELECT session_id, data, expires_at <= extract(epoch FROM now()) * 1000 FROM {conversations}"
        assert {session: Row(text, expired) for session, text, expired in self.tables.run(statement)} == self.rows


def test_both_flavours_match_the_model(dsn, conversations, long):
    with (
        open_both(dsn, PostgresConversationStore, AsyncPostgresConversationStore, table=conversations) as stores,
        psycopg.connect(dsn, autocommit=True) as connection,
    ):
        run_state_machine_as_test(
            partial(Conversations, stores, Tables(connection, conversations=conversations)),
            settings=settings(
                deadline=None, derandomize=True, max_examples=2000 if long else 40, stateful_step_count=50
            ),
        )
