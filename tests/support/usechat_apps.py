"""A server for the page of `examples/usechat`, with fixed answers. Tests run it with uvicorn.

Environment variables: DATABASE_URL, PAGE (the folder of the built page), SDK_VERSION, and LEASE in seconds.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles

from aibind_postgres import AsyncAiSdkHandler, AsyncPostgresConversationStore, AsyncPostgresStreamStore, Generation
from aibind_postgres.contrib.fastapi import router
from aibind_postgres.wire import ai_sdk

SURVIVAL = "What survives a reload?"  # the question of the screenshot
SURVIVAL_ANSWER = (
    "Everything. Each part of this answer is a row in PostgreSQL before you see it.\n\n"
    "Reload the page, open it in a second tab, or lose the network: useChat asks for the running answer, and gets it "
    "from its first word. Stop ends it in every tab."
)
SAID = "count said 40 0.05"  # the answer after the tool call of the page


def count(prompt: str) -> str:
    """Return the whole answer to the prompt `count NAME WORDS PAUSE`."""
    _, name, words, _ = prompt.split()
    return "".join(f"{name}-{number} " for number in range(int(words)))


def answer(generation: Generation) -> Iterator[Any]:
    """Yield the items of an answer, and the pauses in seconds."""
    last = generation.ui_messages[-1]
    if last["role"] == "assistant":
        yield from continue_answer(last)
    elif generation.prompt.startswith("count"):
        for word in count(generation.prompt).split():
            yield f"{word} "
            yield float(generation.prompt.split()[-1])
    elif generation.prompt.startswith("Delete"):
        call_id = f"call-{generation.message_id}"
        yield "I need your permission. "
        yield ai_sdk.tool_input(call_id, "deleteFile", {"file": generation.prompt.split()[1]})
        yield ai_sdk.tool_approval(call_id, f"approval-{call_id}")
    elif generation.prompt == "confirm":
        yield ai_sdk.tool_input(f"call-{generation.message_id}", "confirm", {"question": "Really?"})
    elif generation.prompt == "fail":
        yield "half "
        raise RuntimeError("secret")
    elif generation.prompt == SURVIVAL:
        for word in SURVIVAL_ANSWER.split(" "):
            yield f"{word} "
            yield 0.05
    else:
        yield f"You asked: {generation.prompt}"


def continue_answer(message: dict[str, Any]) -> Iterator[Any]:
    """Continue after the user has decided on a tool call."""
    [part] = [part for part in message["parts"] if "toolCallId" in part]
    if part["state"] == "output-available":
        for word in count(SAID).split():
            yield f"{word} "
            yield 0.05
    elif part["approval"]["approved"]:
        yield ai_sdk.tool_output(part["toolCallId"], {"deleted": part["input"]["file"]})
        yield "It is deleted."
    else:
        yield {"type": "tool-output-denied", "toolCallId": part["toolCallId"]}
        yield "I have kept it."


async def generate(generation: Generation) -> AsyncIterator[Any]:
    for item in answer(generation):
        if isinstance(item, float):
            await asyncio.sleep(item)
        else:
            yield item


def fastapi() -> FastAPI:
    store = AsyncPostgresStreamStore(os.environ["DATABASE_URL"], lease=float(os.environ.get("LEASE", "15")))
    conversations = AsyncPostgresConversationStore(os.environ["DATABASE_URL"])

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with store, conversations:
            yield

    version: Any = int(os.environ["SDK_VERSION"])
    handler = AsyncAiSdkHandler(generate, store=store, conversations=conversations, public=True, sdk_version=version)
    app = FastAPI(lifespan=lifespan)
    app.include_router(router(handler))
    app.mount("/", StaticFiles(directory=os.environ["PAGE"], html=True))
    return app
