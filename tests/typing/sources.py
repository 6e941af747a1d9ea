"""Types of the sources. Checked by mypy, never run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

from langchain_core.language_models import BaseChatModel
from openai import AsyncOpenAI, OpenAI
from typing_extensions import assert_type

from aibind_postgres import AsyncDurableStream, AsyncPostgresStreamStore, DurableStream, PostgresStreamStore
from aibind_postgres.sources import langchain, openai, pydantic_ai
from aibind_postgres.wire.ai_sdk import Encoded, Reasoning

Item = str | Reasoning | dict[str, Any]


def sources(store: PostgresStreamStore, client: OpenAI, model: BaseChatModel) -> None:
    chat = client.chat.completions.create(model="m", messages=[], stream=True)
    assert_type(openai.chat_completions(chat), Iterator[Item])
    assert_type(openai.responses(client.responses.create(model="m", input="", stream=True)), Iterator[Item])
    assert_type(langchain.messages(model.stream("")), Iterator[Item])
    DurableStream.start(store, openai.chat_completions(chat), wire="ai_sdk")
    openai.chat_completions(1)  # type: ignore[call-overload]


class Token:
    def cancel(self) -> None: ...


async def async_sources(
    store: AsyncPostgresStreamStore, client: AsyncOpenAI, model: BaseChatModel, events: AsyncIterator[Any]
) -> None:
    chat = await client.chat.completions.create(model="m", messages=[], stream=True)
    assert_type(openai.chat_completions(chat), AsyncIterator[Item])
    assert_type(openai.responses(await client.responses.create(model="m", input="", stream=True)), AsyncIterator[Item])
    assert_type(langchain.messages(model.astream("")), AsyncIterator[Item])
    async for frames in pydantic_ai.vercel_ai(events, Token()):
        assert_type(frames, Encoded)
    await AsyncDurableStream.start(store, pydantic_ai.ag_ui(events, Token()), wire="ag_ui")
    pydantic_ai.vercel_ai(events)  # type: ignore[call-arg]
