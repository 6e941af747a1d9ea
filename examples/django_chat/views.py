"""The views and stores of the chat."""

import os
from collections.abc import Iterator

from django.http import FileResponse, Http404, HttpRequest, JsonResponse
from shared import DAY, PAGE, PAGE_HEADERS, housekeeping, messages
from shared.model import answer

from aibind_postgres import Generation, PostgresConversationStore, PostgresStreamStore, schema

DSN = os.environ["DATABASE_URL"]
schema.migrate(DSN)  # in production, run this when you deploy
store = PostgresStreamStore(DSN, ttl=DAY)
conversations = PostgresConversationStore(DSN, ttl=30 * DAY)
housekeeping.start(DSN)


def generate(generation: Generation) -> Iterator[str]:
    return answer(generation.messages)


def page(request: HttpRequest) -> FileResponse:
    return FileResponse(PAGE.open("rb"), headers=PAGE_HEADERS)


def conversation(request: HttpRequest, session: str) -> JsonResponse:
    try:
        return JsonResponse(messages.current_path(conversations.load(session)), safe=False)
    except ValueError:  # an invalid id
        raise Http404 from None


def change(request: HttpRequest, session: str, action: str, id: str) -> JsonResponse:
    try:
        with conversations.edit(session) as chat:
            return JsonResponse(messages.change(chat, action, id), safe=False)
    except (LookupError, ValueError):
        raise Http404 from None
