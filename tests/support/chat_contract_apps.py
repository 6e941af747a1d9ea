"""The applications of `test_chat_contract`: a handler with owners in each web framework, for the servers of `webapps`.

The header `User` names the user. The process with the PID in the header `Not-In` responds with status 421, so that a
client can repeat the request until another process answers.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

from aibind_postgres import (
    AsyncPostgresConversationStore,
    AsyncPostgresStreamStore,
    AsyncStreamHandler,
    Generation,
    PostgresConversationStore,
    PostgresStreamStore,
    StreamHandler,
    WebError,
    WebRequest,
)
from aibind_postgres._async.producing import AsyncProducer
from aibind_postgres._sync.producing import Producer

from . import webapps

MAX_RUNNING = MAX_READERS = 2
OPTIONS: dict[str, Any] = {**webapps.OPTIONS, "max_running": MAX_RUNNING, "max_readers": MAX_READERS}
LEASE = 1.0  # seconds


def owner(refuse: webapps.Refuse, request: WebRequest) -> str | None:
    if request.headers.get("not-in") == f"{os.getpid()}":
        raise WebError(421, "another process should answer")
    user = request.headers.get("user")
    if user == "refused":
        refuse()
    return user


def source(store: PostgresStreamStore, generation: Generation) -> Iterator[str]:
    """Yield an answer.

    - To `follow ID`: the PID, and then the chunks of the stream ID, with which a test writes the answer.
    - For `/complete`: the PID and the number of answers that this process produces.
    - To another prompt: the messages, so that a test sees them.
    """
    command, _, id = generation.prompt.partition(" ")
    if generation.kind == "complete":
        yield f"{os.getpid()} {len(Producer.running())}"
    elif command == "follow":
        yield f"{os.getpid()}"
        for chunk in store.read_from(id):
            yield chunk.data
    else:
        yield "|".join(message["content"] for message in generation.messages)


async def async_source(store: AsyncPostgresStreamStore, generation: Generation) -> AsyncIterator[str]:
    command, _, id = generation.prompt.partition(" ")
    if generation.kind == "complete":
        yield f"{os.getpid()} {len(AsyncProducer.running())}"
    elif command == "follow":
        yield f"{os.getpid()}"
        async for chunk in store.read_from(id):
            yield chunk.data
    else:
        yield "|".join(message["content"] for message in generation.messages)


def handler(refuse: webapps.Refuse) -> StreamHandler:
    dsn = os.environ["DATABASE_URL"]
    store, conversations = PostgresStreamStore(dsn, lease=LEASE), PostgresConversationStore(dsn)
    return StreamHandler(
        partial(source, store), store=store, conversations=conversations, owner=partial(owner, refuse), **OPTIONS
    )


def async_handler(refuse: webapps.Refuse) -> AsyncStreamHandler:
    dsn = os.environ["DATABASE_URL"]
    store, conversations = AsyncPostgresStreamStore(dsn, lease=LEASE), AsyncPostgresConversationStore(dsn)
    return AsyncStreamHandler(
        partial(async_source, store), store=store, conversations=conversations, owner=partial(owner, refuse), **OPTIONS
    )


def refuse_in_django() -> None:
    from django.core.exceptions import PermissionDenied

    raise PermissionDenied


flask = partial(webapps.flask, handler)
django_wsgi = partial(webapps.django_wsgi, lambda refuse: handler(refuse_in_django))
fastapi = partial(webapps.fastapi, async_handler)

# The status with which each application refuses.
REFUSED = {"flask": 401, "django, wsgi": 403, "fastapi": 402}
