"""The views and stores of the chat."""

import os
from collections.abc import Iterator

from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from shared import DAY, another_answer, housekeeping, messages, page_file
from shared.model import answer

from aibind_postgres import Generation, PostgresConversationStore, PostgresStreamStore, schema

DSN = os.environ["DATABASE_URL"]
schema.migrate(DSN)  # in production, run this when you deploy
store = PostgresStreamStore(DSN, ttl=DAY)
conversations = PostgresConversationStore(DSN, ttl=30 * DAY)
housekeeping.start(DSN)


def generate(generation: Generation) -> Iterator[str]:
    return answer(generation.messages)


def page(request: HttpRequest, name: str = "index.html") -> HttpResponse:
    try:
        content, headers = page_file(name)
    except LookupError:
        raise Http404 from None
    return HttpResponse(content, headers=headers)


def conversation(request: HttpRequest, session: str) -> JsonResponse:
    try:
        if request.method == "DELETE":
            return JsonResponse({"ok": conversations.delete(session)})
        return JsonResponse(messages.current_path(conversations.load(session)), safe=False)
    except ValueError:  # an invalid id
        raise Http404 from None


def answer_again(request: HttpRequest, session: str, id: str) -> JsonResponse:
    try:
        return JsonResponse({"id": another_answer.start(store, conversations, session, id)})
    except (LookupError, ValueError):
        raise Http404 from None


def change(request: HttpRequest, session: str, action: str, id: str) -> JsonResponse:
    try:
        with conversations.edit(session) as chat:
            return JsonResponse(messages.change(chat, action, id), safe=False)
    except (LookupError, ValueError):
        raise Http404 from None
