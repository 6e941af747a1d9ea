"""A chat. Its web processes and a worker process produce the answers, until a test kills them.

The folder of `RECORDS` is shared by the processes and the test. It contains `web/PID` for each web process, `jobs/ID`
for each stream that waits for a worker process, and `acknowledged`: the numbers of stored tokens that the producers
have read during their answers.
"""

from __future__ import annotations

import os
import random
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from support.chat_users import LEASE, token
from support.concurrency import async_sleep

from aibind_postgres import (
    AsyncDurableStream,
    AsyncPostgresConversationStore,
    AsyncPostgresStreamStore,
    AsyncStreamHandler,
    ChatHistory,
    StreamNotActiveError,
)
from aibind_postgres._concurrency import async_spawn
from aibind_postgres.history import new_id

RECORDS = Path(os.environ["RECORDS"])
JOBS = RECORDS / "jobs"


class AsyncChat:
    """The application, for the users that the header `User` names."""

    def __init__(self) -> None:
        dsn = os.environ["DATABASE_URL"]
        self.store = AsyncPostgresStreamStore(dsn, lease=LEASE, ttl=3600)
        self.conversations = AsyncPostgresConversationStore(dsn, ttl=None)
        self.handler = AsyncStreamHandler(
            self.generate,
            store=self.store,
            conversations=self.conversations,
            owner=lambda request: request.headers.get("user"),
            heartbeat=0.5,
        )
        (RECORDS / "web" / f"{os.getpid()}").touch()

    def generate(self, generation: Any) -> Any:
        roles = [message["role"] for message in generation.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"], f"a model refuses {roles}"
        assert all(message["content"].strip() for message in generation.messages), "a model refuses a blank message"
        return answer(self.store, str(generation.stream_id))

    async def ask_worker(self, user: str, session_id: str, prompt: str) -> str:
        """Save a question, and let the worker process answer it. Return the id of the stream."""
        stream_id = new_id()
        async with self.conversations.edit(session_id, owner=user) as chat:
            add_question(chat, prompt, stream_id)
        await self.store.create(stream_id, lease=LEASE, session_id=session_id, owner=user)
        (JOBS / stream_id).touch()
        return stream_id


def add_question(chat: ChatHistory[Any], prompt: str, stream_id: str) -> None:
    """Add a question. It is an alternative to the last one if that has no answer."""
    message, metadata = {"role": "user", "content": prompt}, {"streamId": stream_id}
    last = chat.tree.get(chat.tree.active_leaf_id or "")
    if last is None or last.message["role"] == "assistant":
        chat.append(message, metadata)
    elif last.parent_id is None:
        chat.tree.add_root(message, metadata)
    else:
        chat.tree.branch(last.parent_id, message, metadata)


async def answer(store: AsyncPostgresStreamStore, stream_id: str) -> Any:
    """Yield the tokens of an answer. After some of them, record how many are stored."""
    for number in range(1, random.randint(10, 50)):
        yield token(stream_id, number, os.getpid())
        await async_sleep(random.uniform(0.01, 0.1))
        if number % 4 == 0:
            status = await store.get_status(stream_id)
            line = f"{stream_id} {status.total_chunks if status else None}\n"
            with (RECORDS / "acknowledged").open("ab", buffering=0) as file:
                file.write(line.encode())  # one write, so that other processes and SIGKILL leave the line whole


async def produce(store: AsyncPostgresStreamStore, stream_id: str) -> None:
    with suppress(StreamNotActiveError):  # no worker process has begun within the lease
        await AsyncDurableStream.produce(store, stream_id, answer(store, stream_id))


def claim(job: Path) -> bool:
    try:
        job.unlink()
    except FileNotFoundError:
        return False
    return True


async def work() -> None:
    """Produce the answers of all jobs."""
    running = []  # asyncio holds only weak references to tasks
    async with AsyncPostgresStreamStore(os.environ["DATABASE_URL"], lease=LEASE, ttl=3600) as store:
        while True:
            jobs = [job.name for job in JOBS.iterdir() if claim(job)]
            running += [async_spawn(partial(produce, store, job), "job") for job in jobs]
            await async_sleep(0.05)
