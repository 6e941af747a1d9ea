"""The views and stores of the chat."""

import os

from django.http import Http404, HttpRequest, HttpResponse
from shared import DAY, browser_cookie, browser_of, page_file

from aibind_postgres import Housekeeper, PostgresConversationStore, PostgresStreamStore, WebRequest, schema

DSN = os.environ["DATABASE_URL"]
schema.migrate(DSN)  # in production, run this when you deploy
store = PostgresStreamStore(DSN, ttl=DAY)
conversations = PostgresConversationStore(DSN, ttl=30 * DAY)
Housekeeper(store, conversations).start()  # with `gunicorn --preload`, in its hook post_fork


def owner(request: WebRequest) -> str | None:
    return browser_of(request.original.COOKIES)


def page(request: HttpRequest) -> HttpResponse:
    response = file(request, "index.html")
    response.set_cookie(**browser_cookie(request.COOKIES))
    return response


def file(request: HttpRequest, name: str) -> HttpResponse:
    try:
        content, headers = page_file(name)
    except LookupError:
        raise Http404 from None
    return HttpResponse(content, headers=headers)
