"""Write answers in Celery workers. A web process calls `ask`, and a browser reads the stream with the returned id.

Start a worker with the variables DATABASE_URL and BROKER_URL: celery --app celery_worker worker
"""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache

from celery import Celery

from aibind_postgres import DurableStream, PostgresStreamStore, StreamNotActiveError

app = Celery("answers", broker=os.environ["BROKER_URL"])


@cache
def store() -> PostgresStreamStore:
    """Return the store of this process. Celery forks its worker processes, so each makes its own."""
    return PostgresStreamStore(os.environ["DATABASE_URL"])


def generate(prompt: str) -> Iterator[str]:
    # Replace this with your model.
    for word in f"You have asked: {prompt}".split():
        yield f"{word} "
        time.sleep(0.1)


@app.task
def answer(stream_id: str, prompt: str) -> None:
    with suppress(StreamNotActiveError):  # the user has stopped it, or no worker was free within the lease
        DurableStream.produce(store(), stream_id, generate(prompt), idle_timeout=60)


def ask(prompt: str) -> str:
    """Create a stream and a task that writes it. If no worker begins within a minute, the stream ends."""
    stream_id = store().create(lease=60)
    answer.delay(stream_id, prompt)
    return stream_id
