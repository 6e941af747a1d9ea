"""Django: `urlpatterns = [*urlpatterns(handler)]`, with the asynchronous handler under ASGI, the other under WSGI."""

from __future__ import annotations

import re
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from asgiref.sync import AsyncToSync, SyncToAsync, ThreadSensitiveContext
from django.core.exceptions import ImproperlyConfigured
from django.core.handlers.asgi import ASGIRequest
from django.db import connections
from django.db.transaction import non_atomic_requests
from django.http import HttpResponse, StreamingHttpResponse, UnreadablePostError
from django.urls import re_path
from django.views.decorators.csrf import csrf_exempt

from .. import AsyncStreamHandler, AsyncWebResponse, StreamHandler, WebRequest, WebResponse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from django.http import HttpRequest
    from django.http.response import HttpResponseBase
    from django.urls import URLPattern


def urlpatterns(handler: StreamHandler | AsyncStreamHandler) -> list[URLPattern]:
    """Return the URL patterns of a handler, to be put at the root.

    The request that `generate` and `authorize` get as `original` is Django's own. Under the other kind of server than
    the handler's, `ImproperlyConfigured` is raised. The views are exempt from the CSRF check, for which aibind's
    browser client sends no token: see `authorize`, and to it that session cookies are SameSite. They are exempt from
    `ATOMIC_REQUESTS` as well: an answer is stored while it is written, and not in the transaction of its request.
    """
    if isinstance(handler, AsyncStreamHandler):
        asynchronous = handler

        async def view(request: HttpRequest, path: str) -> HttpResponseBase:
            _serve_by(asynchronous, request)
            return _answer(await asynchronous.handle(_asked(asynchronous, request, path)))
    else:
        synchronous = handler

        def view(request: HttpRequest, path: str) -> HttpResponseBase:  # type: ignore[misc]  # one name, two flavours
            _serve_by(synchronous, request)
            return _answer(synchronous.handle(_asked(synchronous, request, path)))

    for alias in connections:
        non_atomic_requests(using=alias)(view)
    root = re.escape(f"{handler.prefix}/"[1:])
    return [re_path(f"^{root}(?P<path>.*)$", csrf_exempt(view), name="aibind")]


def _serve_by(handler: StreamHandler | AsyncStreamHandler, request: HttpRequest) -> None:
    if isinstance(handler, AsyncStreamHandler) != isinstance(request, ASGIRequest):
        # Django would hold an answer back until it is complete, or run each request in an event loop of its own.
        raise ImproperlyConfigured(
            f"{type(handler).__name__} is for another kind of server: use AsyncStreamHandler under ASGI, StreamHandler "
            "under WSGI"
        )


def _asked(handler: StreamHandler | AsyncStreamHandler, request: HttpRequest, path: str) -> WebRequest:
    return WebRequest(
        str(request.method),
        f"{handler.prefix}/{path}",
        request.GET.dict(),
        {name.lower(): value for name, value in request.headers.items()},
        _body(request, handler.max_body + 1),  # the handler refuses what is longer
        request,
        _own_thread if isinstance(handler, AsyncStreamHandler) else _own_connections,
    )


@contextmanager
def _own_connections() -> Iterator[None]:
    """Close the connections that an answer has made in a thread of its own, in which no request ends."""
    try:
        yield
    finally:
        connections.close_all()


@asynccontextmanager
async def _own_thread() -> AsyncIterator[None]:
    """Give an answer a thread of its own for what is synchronous, since that of its request ends with the request.

    A `ThreadSensitiveContext` that is entered inside that of a request does nothing; to have it do something takes
    asgiref 3.13, which Python 3.10 cannot have.
    """
    context = ThreadSensitiveContext()
    token = SyncToAsync.thread_sensitive_context.set(context)
    outer = getattr(AsyncToSync.executors, "current", None)  # of a synchronous middleware: it would come first
    AsyncToSync.executors.current = None
    try:
        yield
    finally:
        AsyncToSync.executors.current = outer
        SyncToAsync.thread_sensitive_context.reset(token)
        if (executor := SyncToAsync.context_to_thread_executor.pop(context, None)) is not None:
            executor.submit(connections.close_all)
            executor.shutdown(wait=False)


def _body(request: HttpRequest, most: int) -> bytes:
    try:
        return bytes(request.read(most))
    except UnreadablePostError:  # the client has gone away: no fault of the application, and nobody is left to be told
        return b""


def _answer(response: WebResponse | AsyncWebResponse) -> HttpResponseBase:
    headers = dict(response.headers)
    if isinstance(response.body, bytes):
        return HttpResponse(response.body, status=response.status, headers=headers)
    headers["Content-Encoding"] = "identity"  # else GZipMiddleware would hold events back
    return StreamingHttpResponse(response.body, status=response.status, headers=headers)
