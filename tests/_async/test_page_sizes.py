"""Pages are bounded in bytes: for every way of reading, from the first page on."""

from __future__ import annotations

import math
from functools import partial

import pytest
from support.concurrency import AsyncBackground, async_gather
from support.recording import AsyncRecordingClient

from aibind_postgres import AsyncPostgresStreamStore, SequenceConflictError
from aibind_postgres._async.reading import SharedRead
from aibind_postgres._pages import BATCH_BYTES, PAGE_BYTES
from aibind_postgres._stream_tail import SHARED_PAGE_CHUNKS

# Sizes of chunks: large ones from the start, larger ones than a page, and after many small ones; in several scripts.
TEXTS = {
    "large": ["x" * 100_000] * 50,
    "larger than a page": ["x" * 10, "y" * (PAGE_BYTES + 1), "x", "z" * (2 * PAGE_BYTES)],
    "after small ones": [*"x" * 3000, *["y" * 300_000] * 9, *"x" * 3000, "z" * 50_000, ""],
    "between small ones": ["x", "x" * 50_000, ""] * 60,
    "emoji": ["\N{GRINNING FACE}" * 10_000] * 60,
}


@pytest.fixture
async def client(dsn):
    async with AsyncRecordingClient(dsn) as client:
        yield client


@pytest.fixture
async def store(client, tables):
    async with AsyncPostgresStreamStore(client, **tables) as store:
        yield store


def largest_answer(client):
    """Return the largest size in bytes of a page with more than one chunk."""
    statements = [each for each in client.statements if "-greatest(total_chunks" in each.sql and each.rows]
    pages = [[row[1].encode() for row in each.rows[1:] if row[1] is not None] for each in statements]
    return max(sum(map(len, texts)) for texts in pages if len(texts) != 1)


@pytest.mark.parametrize("texts", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("way", ["read_from", "stored", "replay", "events", "stored events", "read_with_times"])
async def test_every_page_is_bounded(store, other, client, texts, way):
    id = await other.create()
    await other.append_many(id, texts)
    await other.complete(id)
    ways = {
        "read_from": store.read_from(id),
        "stored": store.read_from(id, follow=False),
        "replay": store.replay(id, speed=math.inf),
        "events": store.events(id),
        "stored events": store.events(id, follow=False),
        "read_with_times": store.read_with_times(id),
    }
    assert [chunk.data async for chunk in ways[way]] == texts
    assert 0 < largest_answer(client) <= PAGE_BYTES


@pytest.mark.parametrize("texts", TEXTS.values(), ids=TEXTS)
async def test_every_shared_page_is_bounded(store, other, client, texts):
    id = await other.create()

    async def read():
        return [chunk.data async for chunk in store.read_from(id)]

    async with AsyncBackground(partial(async_gather, read, read, read)) as readers:
        await client.wait_for_followers(id, 3)
        await other.append_many(id, texts)
        await other.complete(id)
        assert await readers.result() == [texts] * 3
    assert largest_answer(client) <= PAGE_BYTES


async def test_pages_of_a_shared_statement_are_bounded_together(store, other, client):
    ids = [await other.create() for _ in range(20)]
    for id in ids:
        await other.append_many(id, ["x" * 4_000] * 150)
    reads = [partial(store._pages.shared_page, SharedRead(id, 0, SHARED_PAGE_CHUNKS)) for id in ids]
    pages = await async_gather(*reads)
    assert all(page.rows and page.end >= page.rows[-1][0] for page in pages)
    batches = [statement.rows for statement in client.statements if "json_to_recordset" in statement.sql]
    assert batches
    for rows in batches:
        assert sum(len(text) for _, seq, text in rows if seq > 0 and text is not None) <= BATCH_BYTES


async def test_repeated_append_of_large_chunks(store):
    id = await store.create()
    texts = ["x" * 100_000] * 50
    assert await store.append_many(id, texts, expected_seq=1) == 50
    assert await store.append_many(id, texts, expected_seq=1) == 50
    with pytest.raises(SequenceConflictError):
        await store.append_many(id, [*texts[:-1], "y"], expected_seq=1)
    assert (await store.get_status(id)).total_chunks == 50
