"""Cancelled saves, and changes of a history during a save. Asynchronous flavour only."""

from __future__ import annotations

import asyncio
import random

from psycopg_pool import AsyncConnectionPool

from aibind_postgres import AsyncPostgresConversationStore


def messages(chat):
    return sorted(node["message"] for node in chat.tree.serialize()["nodes"].values())


async def test_changes_during_a_save_are_kept_and_saved_next(dsn, conversations):
    async with AsyncPostgresConversationStore(dsn, table=conversations) as store:
        for conflict in (False, True):
            chat = await store.load("s")
            chat.append(f"before {conflict}")
            if conflict:
                async with store.edit("s") as other:
                    other.append("by another writer")
            saving = asyncio.create_task(store.save("s", chat))
            await asyncio.sleep(0)
            chat.append(f"during {conflict}")
            await saving
            expected = [f"before {conflict}", f"during {conflict}"]
            assert chat.messages[-2:] == expected
            assert (await store.load("s")).messages[-1] == expected[0]
            await store.save("s", chat, on_conflict="raise")
            assert (await store.load("s")).to_json() == chat.to_json()
        assert messages(chat) == ["before False", "before True", "by another writer", "during False", "during True"]


async def test_concurrent_saves_of_one_history(dsn, conversations):
    async with AsyncPostgresConversationStore(dsn, table=conversations) as store:
        chat = await store.load("s")
        for number in range(20):
            chat.append(f"{number:02} a")
            first = asyncio.create_task(store.save("s", chat))
            await asyncio.sleep(0)
            chat.append(f"{number:02} b")
            await asyncio.gather(first, store.save("s", chat))
        await store.save("s", chat)
        expected = [f"{number:02} {letter}" for number in range(20) for letter in "ab"]
        assert (await store.load("s")).messages == chat.messages == expected


async def test_cancelled_saves_lose_nothing_and_release_their_connections(dsn, conversations):
    rng = random.Random(7)
    async with AsyncConnectionPool(dsn, min_size=2, max_size=2, open=False) as pool:
        async with AsyncPostgresConversationStore(pool, table=conversations) as store:
            expected = []

            async def work(name):
                chat = await store.load("s")
                for number in range(40):
                    chat.append(f"{name} {number:02}")
                    expected.append(f"{name} {number:02}")
                    task = asyncio.create_task(store.save("s", chat))
                    await asyncio.sleep(rng.random() / 100)
                    task.cancel()
                    await asyncio.wait([task])
                await store.save("s", chat)

            await asyncio.gather(*(work(name) for name in "abcd"))
            assert messages(await store.load("s")) == sorted(expected)
        async with pool.connection() as one, pool.connection() as two:
            assert (one.autocommit, two.autocommit) == (False, False)
