"""Chats in FastAPI with bearer tokens, and the list of a user's conversations with titles and running answers.

pip install 'aibind-postgres[binary,cli,fastapi]' uvicorn
export TOKENS='{"SHA-256 of a token, in hexadecimal digits": "user"}' DATABASE_URL=postgresql://…
aibind-postgres migrate && uvicorn --app-dir examples --workers 2 fastapi_list:app

GET /__aibind__/conversations lists the conversations, each with the id of its running answer, for /stream/resume.
"""

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from aibind_postgres import AsyncDurableStream, AsyncHousekeeper, AsyncStreamHandler, Generation
from aibind_postgres import AsyncPostgresConversationStore as ConversationStore
from aibind_postgres import AsyncPostgresStreamStore as StreamStore
from aibind_postgres.contrib.fastapi import router

USERS: dict[str, str] = json.loads(os.environ["TOKENS"])
store = StreamStore(os.environ["DATABASE_URL"])
conversations = ConversationStore(os.environ["DATABASE_URL"], ttl=None)


async def current_user(request: Request, sent: Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())]) -> str:
    user = USERS.get(hashlib.sha256(sent.credentials.encode()).hexdigest())
    if user is None:
        raise HTTPException(401, headers={"WWW-Authenticate": "Bearer"})
    request.state.user = user
    return user


async def generate(generation: Generation) -> AsyncIterator[str]:
    # When the generator runs, the question is saved, so the conversation exists.
    info = await conversations.get_info(generation.session_id) if generation.session_id else None
    if generation.kind == "stream" and info is not None and info.title is None:
        await conversations.describe(info.session_id, title=generation.prompt[:60])
    for word in f"{generation.owner}, you asked: {generation.prompt}".split():  # replace this with your model
        yield f"{word} "
        await asyncio.sleep(0.1)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with store, conversations, AsyncHousekeeper(store, conversations):
        yield
        await AsyncDurableStream.shutdown(store, timeout=20)


app = FastAPI(lifespan=lifespan)
handler = AsyncStreamHandler(
    generate, store=store, conversations=conversations, owner=lambda request: request.original.state.user, max_running=2
)
app.include_router(router(handler), dependencies=[Depends(current_user)])
