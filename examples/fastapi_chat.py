"""A chat in FastAPI. Its answers survive a reload of the page, a lost connection, and a browser that disconnects.

If the web server is restarted, the text so far is kept.

pip install 'aibind-postgres[binary,fastapi]' uvicorn
DATABASE_URL=postgresql://… uvicorn --app-dir examples fastapi_chat:app
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, Request, Response
from shared import DAY, browser_cookie, browser_of, page_file
from shared.model import async_generate

from aibind_postgres import (
    AsyncDurableStream,
    AsyncHousekeeper,
    AsyncPostgresConversationStore,
    AsyncPostgresStreamStore,
    AsyncStreamHandler,
    WebRequest,
    schema,
)
from aibind_postgres.contrib.fastapi import router

DSN = os.environ["DATABASE_URL"]
store = AsyncPostgresStreamStore(DSN, ttl=DAY)
conversations = AsyncPostgresConversationStore(DSN, ttl=30 * DAY)


def owner(request: WebRequest) -> str | None:
    return browser_of(request.original.cookies)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    await schema.async_migrate(DSN)  # in production, run this when you deploy
    async with store, conversations, AsyncHousekeeper(store, conversations):
        yield
        await AsyncDurableStream.shutdown(store, timeout=0.5)  # seconds in which running answers may finish


app = FastAPI(lifespan=lifespan)
app.include_router(router(AsyncStreamHandler(async_generate, store=store, conversations=conversations, owner=owner)))


@app.get("/")
async def page(request: Request) -> Response:
    response = await file("index.html")
    response.set_cookie(**browser_cookie(request.cookies))
    return response


@app.get("/page/{name:path}")
async def file(name: str) -> Response:
    try:
        content, headers = page_file(name)
    except LookupError:
        raise HTTPException(404) from None
    return Response(content, headers=headers)
