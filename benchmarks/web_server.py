"""The web server of the benchmarks: uvicorn with the handler for useChat, and a route that stores nothing."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection as Pipe
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from aibind_postgres import AsyncAiSdkHandler, AsyncPostgresConversationStore, Generation, WebRequest
from aibind_postgres.contrib.starlette import routes
from aibind_postgres.wire.ai_sdk import AiSdkWire

from .measure import TOKEN
from .tables import Tables

PAUSE = 0.01  # seconds between the tokens of a short answer; the model of a real one is slower
FILES = 4_000  # of one process; the usual limit of 1,024 is too low for 1,000 connections
BACKLOG = 2048  # the default of uvicorn


def allow_connections() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


class LiveAnswers:
    """The sources of answers that yield tokens at a fixed rate, each with the time at which it is yielded.

    The first token comes at once. The others begin when all readers are connected.
    """

    def __init__(self, answers: int, tokens: int, rate: int) -> None:
        self._answers = answers
        self._tokens = tokens
        self._rate = rate
        self._begin: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    def begin(self, at: float) -> None:
        self._begin.set_result(at)

    async def answer(self, number: int) -> AsyncIterator[str]:
        yield str(time.monotonic())
        begin = await asyncio.shield(self._begin)
        for token in range(self._tokens):
            # The answers are not synchronized, as in reality.
            due = begin + (token + number / self._answers) / self._rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            yield str(time.monotonic())


async def short_answer() -> AsyncIterator[str]:
    yield TOKEN
    await asyncio.sleep(PAUSE)
    yield TOKEN


async def bare_answer(request: Request) -> StreamingResponse:
    """Respond with the same bytes as the handler, without a database."""
    await request.json()

    def frame(**chunk: str) -> bytes:
        return f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n".encode()

    async def frames() -> AsyncIterator[bytes]:
        yield frame(type="start", messageId="answer")
        yield frame(type="start-step")
        yield frame(type="text-start", id="text-1")
        async for token in short_answer():
            yield frame(type="text-delta", id="text-1", delta=token)
        yield frame(type="text-end", id="text-1")
        yield frame(type="finish-step")
        yield frame(type="finish", finishReason="stop")
        yield b"data: [DONE]\n\n"

    return StreamingResponse(frames(), headers=dict(AiSdkWire.headers))


def serve(pipe: Pipe, tables: Tables, answers: int = 0, tokens: int = 0, rate: int = 1) -> None:
    """Child process: send the port, then serve until the parent closes the pipe.

    Each number that the parent sends is the time at which the tokens of all answers begin, except None. The processor
    time of this process is sent in return.

    Args:
        pipe: The pipe to the parent.
        tables: The tables of the stores.
        answers: The number of live answers. Default: 0, which makes all answers short ones.
        tokens: The number of tokens of each live answer, without the first one.
        rate: The number of tokens per second.
    """
    allow_connections()
    # With another protocol number, asyncio does not set TCP_NODELAY, and each response waits for an acknowledgement.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    listening.listen(BACKLOG)

    async def control(live: LiveAnswers) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                begin: float | None = await loop.run_in_executor(None, pipe.recv)
            except EOFError:
                server.should_exit = True
                return
            if begin is not None:
                live.begin(begin)
            pipe.send(time.process_time())

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        live = LiveAnswers(answers, tokens, rate)

        def generate(generation: Generation) -> AsyncIterator[str]:
            return live.answer(int(generation.prompt)) if answers else short_answer()

        def owner(request: WebRequest) -> str | None:
            return request.headers.get("user")

        conversations: AsyncPostgresConversationStore = AsyncPostgresConversationStore(
            tables.dsn, table=tables.conversations, status_table=tables.status
        )
        async with tables.async_store() as store, conversations:
            handler = AsyncAiSdkHandler(generate, store=store, conversations=conversations, owner=owner)
            app.router.routes += routes(handler)
            task = asyncio.create_task(control(live))
            pipe.send(listening.getsockname()[1])
            yield
            task.cancel()

    app = Starlette(routes=[Route("/bare", bare_answer, methods=["POST"])], lifespan=lifespan)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", access_log=False, backlog=BACKLOG, timeout_graceful_shutdown=1)
    )
    server.run(sockets=[listening])


def question(chat: str, text: str) -> dict[str, Any]:
    """Return the body with which `useChat` sends the first question of a chat."""
    message = {"id": f"{chat}-question", "role": "user", "parts": [{"type": "text", "text": text}]}
    return {"id": chat, "messages": [message], "trigger": "submit-message"}
