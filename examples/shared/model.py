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

from aibind_postgres import Generation

from .stand_in import tokens

USE_OPENAI = bool(os.environ.get("OPENAI_API_KEY") or os.environ.get("OPENAI_BASE_URL"))
MODEL = os.environ.get("OPENAI_MODEL") or "gpt-4o-mini"

try:
    DELAY = float(os.environ.get("AIBIND_DEMO_DELAY") or 0.03)
except ValueError:
    DELAY = math.nan
if not 0 <= DELAY < math.inf:
    raise ValueError("AIBIND_DEMO_DELAY must be a number of seconds")

SYSTEM = {"role": "system", "content": "You are a helpful assistant. Be brief."}
TITLE = {"role": "system", "content": "Reply with a title of at most five words for this conversation. Nothing else."}


def generate(generation: Generation) -> Iterator[str]:
    """Yield the tokens of an answer, or of a title, for a `StreamHandler`."""
    if USE_OPENAI:
        # The block closes the response, so stopping the answer also stops the model.
        with _client("OpenAI").chat.completions.create(**_parameters(generation)) as stream:
            for event in stream:
                yield from _texts(event)
    else:
        for token in tokens(generation):
            time.sleep(DELAY)
            yield token


async def async_generate(generation: Generation) -> AsyncIterator[str]:
    """Yield the tokens of an answer, or of a title, for an `AsyncStreamHandler`."""
    if USE_OPENAI:
        async with await _client("AsyncOpenAI").chat.completions.create(**_parameters(generation)) as stream:
            async for event in stream:
                for text in _texts(event):
                    yield text
    else:
        for token in tokens(generation):
            await asyncio.sleep(DELAY)
            yield token


def _parameters(generation: Generation) -> dict[str, Any]:
    instructions = TITLE if generation.kind == "title" else SYSTEM
    return {"model": MODEL, "messages": [instructions, *generation.messages], "stream": True}


@cache
def _client(name: str) -> Any:
    import openai

    # The openai package requires a key, even for a self-hosted server that needs none.
    return getattr(openai, name)(api_key=os.environ.get("OPENAI_API_KEY") or "none")


def _texts(event: Any) -> Iterator[str]:
    for choice in event.choices:
        if choice.delta.content:
            yield choice.delta.content
