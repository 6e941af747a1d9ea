"""Large conversations do not block the event loop."""

from __future__ import annotations

import asyncio
import threading

import pytest

from aibind_postgres import AsyncPostgresConversationStore, ChatHistory, _document
from aibind_postgres._async import conversation_histories
from aibind_postgres._concurrency import LARGE


@pytest.fixture
def threads(monkeypatch):
    """The functions that were called, with whether they ran in the thread of the event loop."""
    calls = []

    def record(module, name):
        function = getattr(module, name)

        def wrapper(*args):
            calls.append((name, threading.current_thread() is threading.main_thread()))
            return function(*args)

        monkeypatch.setattr(module, name, wrapper)

    record(conversation_histories, "parse_document")
    record(conversation_histories, "merge")
    record(_document, "serialize_document")
    return calls


@pytest.fixture
async def store(dsn, conversations):
    async with AsyncPostgresConversationStore(dsn, table=conversations) as store:
        yield store


async def load_twice(store, size):
    chat: ChatHistory[str] = ChatHistory()
    chat.append("x" * size)
    await store.save("s", chat)
    return await store.load("s"), await store.load("s")


@pytest.mark.parametrize(("size", "blocks"), [(LARGE // 10, True), (LARGE, False)])
async def test_large_documents_are_handled_in_a_thread(store, threads, size, blocks):
    one, two = await load_twice(store, size)
    one.append("one")
    two.append("two")
    await store.save("s", one)
    await store.save("s", two)
    assert len(two) == 3
    assert {name for name, _ in threads} == {"parse_document", "merge", "serialize_document"}
    assert {in_loop for _, in_loop in threads} == {blocks}


async def test_message_added_during_a_save_is_kept(store):
    one, two = await load_twice(store, LARGE)
    one.append("one")
    await store.save("s", one)
    two.append("two")
    saving = asyncio.create_task(store.save("s", two))
    added = 0
    while not saving.done():
        added += 1
        two.append(f"during {added}")
        await asyncio.sleep(0)
    await saving
    assert len(two) == 3 + added
    await store.save("s", two)
    assert (await store.load("s")).messages == [
        "x" * LARGE,
        "two",
        *(f"during {number + 1}" for number in range(added)),
    ]
