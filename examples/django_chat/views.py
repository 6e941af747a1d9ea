"""What the chat answers, and where it keeps that."""

import os
from collections.abc import Iterator

from django.http import FileResponse, Http404, HttpRequest, JsonResponse
from shared import DAY, PAGE, housekeeping, turns
from shared.model import answer

from aibind_postgres import Generation, PostgresConversationStore, PostgresStreamStore, schema

DSN = os.environ["DATABASE_URL"]
schema.migrate(DSN)  # an application of yours would do so when it is deployed
store = PostgresStreamStore(DSN, ttl=DAY)
conversations = PostgresConversationStore(DSN, ttl=30 * DAY)
housekeeping.start(DSN)


def generate(generation: Generation) -> Iterator[str]:
    return answer(generation.messages)


def page(request: HttpRequest) -> FileResponse:
    return FileResponse(PAGE.open("rb"))


def conversation(request: HttpRequest, session: str) -> JsonResponse:
    try:
        return JsonResponse(turns.shown(conversations.load(session)), safe=False)
    except ValueError:  # no id that a conversation can have
        raise Http404 from None


def change(request: HttpRequest, session: str, action: str, id: str) -> JsonResponse:
    try:
        with conversations.edit(session) as chat:
            return JsonResponse(turns.change(chat, action, id), safe=False)
    except (LookupError, ValueError):
        raise Http404 from None
