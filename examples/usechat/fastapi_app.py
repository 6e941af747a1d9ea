"""A chat with `useChat` of the AI SDK, in FastAPI. Run these commands in this folder.

npm install && npm run build
pip install 'aibind-postgres[binary,cli,fastapi]' uvicorn
export DATABASE_URL=postgresql://…
aibind-postgres migrate && uvicorn fastapi_app:app
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles

from aibind_postgres import AsyncAiSdkHandler, AsyncPostgresConversationStore, AsyncPostgresStreamStore, Generation
from aibind_postgres.contrib.fastapi import router

store = AsyncPostgresStreamStore(os.environ["DATABASE_URL"])
conversations = AsyncPostgresConversationStore(os.environ["DATABASE_URL"], ttl=None)


async def generate(generation: Generation) -> AsyncIterator[str]:
    for word in f"You asked: {generation.prompt}".split():  # replace this with your model
        yield f"{word} "
        await asyncio.sleep(0.1)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with store, conversations:
        yield


# With `public`, the id of a chat suffices to read it. With a login, pass `owner` instead.
handler = AsyncAiSdkHandler(generate, store=store, conversations=conversations, public=True)
app = FastAPI(lifespan=lifespan)
app.include_router(router(handler))
app.mount("/", StaticFiles(directory=Path(__file__).with_name("dist"), html=True))
