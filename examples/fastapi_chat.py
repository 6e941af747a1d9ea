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

from fastapi import FastAPI, HTTPException
from fastapi.responses import FileResponse
from shared import DAY, PAGE, PAGE_HEADERS, messages
from shared.model import LONGEST_PAUSE, async_answer

from aibind_postgres import (
    AsyncDurableStream,
    AsyncPostgresConversationStore,
    AsyncPostgresStreamStore,
    AsyncStreamHandler,
    Generation,
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
        await AsyncDurableStream.shutdown(store, timeout=1)  # running answers have one second to finish


app = FastAPI(lifespan=lifespan)
# Anyone with the id of a conversation can read and change it. Pass authorize=… to restrict that.
app.include_router(router(AsyncStreamHandler(generate, store=store, conversations=conversations)))


@app.get("/")
async def page() -> FileResponse:
    return FileResponse(PAGE, headers=PAGE_HEADERS)


@app.get("/conversation/{session}")
async def conversation(session: str) -> list[dict[str, Any]]:
    try:
        return messages.current_path(await conversations.load(session))
    except ValueError:  # an invalid id
        raise HTTPException(404) from None


@app.post("/conversation/{session}/{action}/{id}")
async def change(session: str, action: str, id: str) -> list[dict[str, Any]]:
    try:
        async with conversations.edit(session) as chat:
            return messages.change(chat, action, id)
    except (LookupError, ValueError):
        raise HTTPException(404) from None
