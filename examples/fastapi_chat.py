"""A chat in FastAPI. Its answers survive a reload and a lost connection.

If the web server restarts, the text so far is kept.

pip install 'aibind-postgres[binary,fastapi]' uvicorn
DATABASE_URL=postgresql://… uvicorn --app-dir examples fastapi_chat:app
"""

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Response
from shared import DAY, messages, page_file
from shared.model import LONGEST_PAUSE, async_answer

from aibind_postgres import (
    AsyncDurableStream,
    AsyncPostgresConversationStore,
    AsyncPostgresStreamStore,
    AsyncStreamHandler,
    Generation,
    StreamStatus,
    schema,
)
from aibind_postgres.contrib.fastapi import router

DSN = os.environ["DATABASE_URL"]
store = AsyncPostgresStreamStore(DSN, ttl=DAY)
conversations = AsyncPostgresConversationStore(DSN, ttl=30 * DAY)


def generate(generation: Generation) -> AsyncIterator[str]:
    return async_answer(generation.messages)


async def housekeeping() -> None:
    """Fail the streams of dead processes and delete expired rows, every 5 seconds. Safe to run in every process."""
    while True:
        await asyncio.sleep(5)
        try:
            await store.fail_abandoned(LONGEST_PAUSE)
            await store.cleanup()
            await conversations.cleanup()
        except Exception:
            logging.exception("housekeeping failed")


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    await schema.async_migrate(DSN)  # in production, run this when you deploy
    async with store, conversations:
        task = asyncio.create_task(housekeeping())
        yield
        task.cancel()
        await AsyncDurableStream.shutdown(store, timeout=0.5)  # seconds in which running answers may finish


app = FastAPI(lifespan=lifespan)
# Anyone with the id of a conversation can read and change it. Pass authorize=… to restrict that.
app.include_router(router(AsyncStreamHandler(generate, store=store, conversations=conversations, public=True)))


@app.get("/")
@app.get("/page/{name:path}")
async def page(name: str = "index.html") -> Response:
    try:
        content, headers = page_file(name)
    except LookupError:
        raise HTTPException(404) from None
    return Response(content, headers=headers)


@app.get("/conversation/{session}")
async def conversation(session: str) -> list[dict[str, Any]]:
    try:
        return messages.current_path(await conversations.load(session))
    except ValueError:  # an invalid id
        raise HTTPException(404) from None


@app.delete("/conversation/{session}")
async def delete(session: str) -> dict[str, bool]:
    try:
        return {"ok": await conversations.delete(session)}
    except ValueError:
        raise HTTPException(404) from None


@app.post("/conversation/{session}/answer/{id}")
async def answer_again(session: str, id: str) -> dict[str, str]:
    """Start another answer to the question `id`. It becomes an alternative to the answers that exist."""
    try:
        history, answers = messages.up_to_question(await conversations.load(session), id)
    except (LookupError, ValueError):
        raise HTTPException(404) from None

    async def save(text: str, status: StreamStatus | None) -> None:
        async with conversations.edit(session) as chat:
            messages.add_answer(chat, id, text, status)

    stream = await AsyncDurableStream.start(store, async_answer(history, answers + 1), on_finish=save)
    return {"id": stream.id}


@app.post("/conversation/{session}/{action}/{id}")
async def change(session: str, action: str, id: str) -> list[dict[str, Any]]:
    try:
        async with conversations.edit(session) as chat:
            return messages.change(chat, action, id)
    except (LookupError, ValueError):
        raise HTTPException(404) from None
