"""The model of the chat examples: a stand-in that yields a fixed text, or a model behind OpenAI's API.

Environment variables:

- OPENAI_API_KEY or OPENAI_BASE_URL: use OpenAI's API instead of the stand-in.
- OPENAI_MODEL: the name of the model. Default: gpt-4o-mini.
- AIBIND_DEMO_DELAY: seconds that the stand-in takes for each token. Default: 0.03.
"""

import asyncio
import math
import os
import re
import time
from collections.abc import AsyncIterator, Iterator
from functools import cache
from typing import Any

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

TEXT = """\
You wrote: “{prompt}”

This is a fixed text, since no language model is configured. It is stored and sent like the answer of a model. Each \
piece of it is a numbered row in PostgreSQL before you see it.

Try to interrupt it. Reload this page: the text is still here, and continues. Open a second tab: both show the same \
text. Disconnect from the network: when it is back, your browser sends the number of the last event it received, and \
continues with the next one, without duplicates. Kill the server in the middle of a sentence: the text so far is kept, \
and the page reports that the answer is incomplete.

Press Stop: the text so far is kept. Edit your question, and the new answer becomes an alternative to this one: use \
the arrows to switch between them. No message is ever overwritten.

This is the end of the text. ✦
"""


def answer(messages: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the tokens of an answer to a conversation."""
    if USE_OPENAI:
        parameters = {"model": MODEL, "messages": [SYSTEM, *messages], "stream": True}
        # The block closes the response, so stopping the answer also stops the model.
        with _client("OpenAI").chat.completions.create(**parameters) as stream:
            for event in stream:
                yield from _texts(event)
    else:
        for token in _tokens(messages):
            time.sleep(DELAY)
            yield token


async def async_answer(messages: list[dict[str, Any]]) -> AsyncIterator[str]:
    """Yield the tokens of an answer to a conversation, for asyncio."""
    if USE_OPENAI:
        parameters = {"model": MODEL, "messages": [SYSTEM, *messages], "stream": True}
        async with await _client("AsyncOpenAI").chat.completions.create(**parameters) as stream:
            async for event in stream:
                for text in _texts(event):
                    yield text
    else:
        for token in _tokens(messages):
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


def _tokens(messages: list[dict[str, Any]]) -> list[str]:
    """Split the text into pieces of the size of a model's tokens: at most 8 characters, with leading white space."""
    return re.findall(r"\s*\S{1,8}", TEXT.format(prompt=messages[-1]["content"]))
