"""The model: a stand-in that types a text back, or, with OPENAI_API_KEY or OPENAI_BASE_URL set, a real one.

OPENAI_MODEL names the real one. AIBIND_DEMO_DELAY is the seconds that the stand-in takes for a token.
"""

import asyncio
import math
import os
import re
import time
from collections.abc import AsyncIterator, Iterator
from functools import cache
from typing import Any

REAL = bool(os.environ.get("OPENAI_API_KEY") or os.environ.get("OPENAI_BASE_URL"))
NAME = os.environ.get("OPENAI_MODEL") or "gpt-4o-mini"

try:
    DELAY = float(os.environ.get("AIBIND_DEMO_DELAY") or 0.03)
except ValueError:
    DELAY = math.nan
if not 0 <= DELAY < math.inf:
    raise ValueError("AIBIND_DEMO_DELAY must be a number of seconds")

# Whoever has not sent a token for so many seconds is not thinking, but gone.
LONGEST_PAUSE = 300 if REAL else 30 + DELAY

SYSTEM = {"role": "system", "content": "You are a helpful assistant. Be brief."}

TEXT = """\
You wrote: “{prompt}”

I am no language model, only a stand-in that types. But what carries my words to you is real. Each of them is a row in \
PostgreSQL before you see it, and it has a number.

So be rude to me. Reload this page: the text will be here, and go on. Open it in a second tab, and both show the same. \
Take your laptop into a lift, and when the network is back your browser says which number it saw last, and gets the \
next one, and none twice. Even if the server dies in the middle of a sentence, what I have said is still there, and \
you are told that I broke off.

Stop me, and what I have said until then is kept. Edit your question, and I answer again beside this answer: the \
little arrows lead from one to the other. Nothing of what we say replaces anything.

That is all I know, dear reader, and I shall say it again as often as you like. ✦
"""


def answer(messages: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the tokens of an answer to a conversation."""
    if REAL:
        asked = {"model": NAME, "messages": [SYSTEM, *messages], "stream": True}
        with _client("OpenAI").chat.completions.create(**asked) as stream:  # so that stopping stops the model as well
            for event in stream:
                yield from _texts(event)
    else:
        for token in _tokens(messages):
            time.sleep(DELAY)
            yield token


async def async_answer(messages: list[dict[str, Any]]) -> AsyncIterator[str]:
    """Do what `answer` does, for asyncio."""
    if REAL:
        asked = {"model": NAME, "messages": [SYSTEM, *messages], "stream": True}
        async with await _client("AsyncOpenAI").chat.completions.create(**asked) as stream:
            async for event in stream:
                for text in _texts(event):
                    yield text
    else:
        for token in _tokens(messages):
            await asyncio.sleep(DELAY)
            yield token


@cache
def _client(kind: str) -> Any:
    import openai

    # Servers of one's own, behind OPENAI_BASE_URL, often want no key; the package wants one.
    return getattr(openai, kind)(api_key=os.environ.get("OPENAI_API_KEY") or "none")


def _texts(event: Any) -> Iterator[str]:
    for choice in event.choices:
        if choice.delta.content:
            yield choice.delta.content


def _tokens(messages: list[dict[str, Any]]) -> list[str]:
    """Return a text in pieces of the size of a model's tokens: a word, or a part of a long one."""
    return re.findall(r"\s*\S{1,8}", TEXT.format(prompt=messages[-1]["content"]))
