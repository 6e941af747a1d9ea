"""The model of the chat examples: a stand-in that yields fixed texts, or a model behind OpenAI's API.

Environment variables:

- OPENAI_API_KEY or OPENAI_BASE_URL: use OpenAI's API instead of the stand-in.
- OPENAI_MODEL: the name of the model. Default: gpt-4o-mini.
- AIBIND_DEMO_DELAY: seconds that the stand-in takes for each token. Default: 0.03.
"""

import asyncio
import math
import os
import time
from collections.abc import AsyncIterator, Iterator
from functools import cache
from typing import Any

from .stand_in import tokens

USE_OPENAI = bool(os.environ.get("OPENAI_API_KEY") or os.environ.get("OPENAI_BASE_URL"))
MODEL = os.environ.get("OPENAI_MODEL") or "gpt-4o-mini"

try:
    DELAY = float(os.environ.get("AIBIND_DEMO_DELAY") or 0.03)
except ValueError:
    DELAY = math.nan
if not 0 <= DELAY < math.inf:
    raise ValueError("AIBIND_DEMO_DELAY must be a number of seconds")

# Seconds without a token after which a producer is considered dead.
LONGEST_PAUSE = 300 if USE_OPENAI else 30 + DELAY

SYSTEM = {"role": "system", "content": "You are a helpful assistant. Be brief."}


def answer(messages: list[dict[str, Any]], number: int = 1) -> Iterator[str]:
    """Yield the tokens of an answer to a conversation. The number counts the answers to the same question."""
    if USE_OPENAI:
        parameters = {"model": MODEL, "messages": [SYSTEM, *messages], "stream": True}
        # The block closes the response, so stopping the answer also stops the model.
        with _client("OpenAI").chat.completions.create(**parameters) as stream:
            for event in stream:
                yield from _texts(event)
    else:
        for token in tokens(messages[-1]["content"], number):
            time.sleep(DELAY)
            yield token


async def async_answer(messages: list[dict[str, Any]], number: int = 1) -> AsyncIterator[str]:
    """Yield the tokens of an answer to a conversation, for asyncio."""
    if USE_OPENAI:
        parameters = {"model": MODEL, "messages": [SYSTEM, *messages], "stream": True}
        async with await _client("AsyncOpenAI").chat.completions.create(**parameters) as stream:
            async for event in stream:
                for text in _texts(event):
                    yield text
    else:
        for token in tokens(messages[-1]["content"], number):
            await asyncio.sleep(DELAY)
            yield token


@cache
def _client(name: str) -> Any:
    import openai

    # The openai package requires a key, even for a self-hosted server that needs none.
    return getattr(openai, name)(api_key=os.environ.get("OPENAI_API_KEY") or "none")


def _texts(event: Any) -> Iterator[str]:
    for choice in event.choices:
        if choice.delta.content:
            yield choice.delta.content
