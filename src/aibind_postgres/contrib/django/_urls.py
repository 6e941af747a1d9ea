"""The URL patterns of a handler."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from asgiref.sync import sync_to_async
from django.core.exceptions import BadRequest, ImproperlyConfigured, PermissionDenied, SuspiciousOperation
from django.core.handlers.asgi import ASGIRequest
from django.db import close_old_connections, connections
from django.db.transaction import non_atomic_requests
from django.http import Http404, HttpRequest, HttpResponse, StreamingHttpResponse, UnreadablePostError
from django.http.response import HttpResponseBase
from django.urls import URLPattern, re_path
from django.views.decorators.csrf import csrf_exempt

from ..._async.responses import AsyncWebResponse
from ..._async.web_handler import AsyncWebHandler
from ..._sync.responses import WebResponse
from ..._sync.web_handler import WebHandler
from ..._workarounds import separate_asgiref_thread
from ...adapters import is_testing_django
from ...web import QueryParameters, WebRequest
from .._wsgi import disconnect_of
from ._clients import in_any_test

REFUSALS = (BadRequest, Http404, PermissionDenied, SuspiciousOperation)  # for which Django has a status


def urlpatterns(handler: WebHandler | AsyncWebHandler) -> list[URLPattern]:
    """Return the URL patterns of a handler. Include them at the root of the URL configuration.

    `WebRequest.original` is the Django request.

    The views are exempt from the CSRF check, since aibind's browser client sends no CSRF token. The handler itself
    refuses requests from pages of other origins. The views are also exempt from `ATOMIC_REQUESTS`, since an answer is
    committed while it is produced.

    A reader holds no connection of Django: those that `owner`, `authorize`, `generate` or middleware have used are
    closed before the response begins, unless `CONN_MAX_AGE` keeps them.

    Args:
        handler: An asynchronous handler for a server that uses ASGI, a synchronous one for a server that uses WSGI.

    Returns:
        The URL patterns, under the handler's prefix. Their views raise `ImproperlyConfigured` if the handler does not
        match the server.

    Example:
        from aibind_postgres.contrib import django as aibind

        urlpatterns = [*aibind.urlpatterns(handler)]
    """
    if isinstance(handler, AsyncWebHandler):
        asynchronous = handler

        async def view(request: HttpRequest, path: str = "") -> HttpResponseBase:
            _check_server(asynchronous, request)
            # A source uses a thread of its own, but in the transaction of a test that of the test.
            shares_thread = is_testing_django() and await sync_to_async(in_any_test)()
            context = nullcontext if shares_thread else partial(separate_asgiref_thread, connections.close_all)
            response = await asynchronous.handle(_from_django(asynchronous, request, path, context))
            await sync_to_async(_close_old_connections)()
            return _to_django(response)
    else:
        synchronous = handler

        def view(request: HttpRequest, path: str = "") -> HttpResponseBase:  # type: ignore[misc]  # one name, two flavours
            _check_server(synchronous, request)
            response = synchronous.handle(_from_django(synchronous, request, path, _close_connections))
            _close_old_connections()
            return _to_django(response)

    for alias in connections:
        non_atomic_requests(using=alias)(view)
    root = re.escape(handler.prefix[1:])
    # The id of a conversation may contain line breaks.
    path = "(?P<path>(?s:.*))"
    pattern = rf"^{root}(?:/{path})?\Z" if root else rf"^{path}\Z"
    return [re_path(pattern, csrf_exempt(view), name="aibind")]


def _check_server(handler: WebHandler | AsyncWebHandler, request: HttpRequest) -> None:
    if isinstance(handler, AsyncWebHandler) != isinstance(request, ASGIRequest):
        # Django would buffer the whole answer (ASGI), or run each request in a new event loop (WSGI).
        raise ImproperlyConfigured(
            f"{type(handler).__name__} does not match the server: use an asynchronous handler under ASGI, and a "
            "synchronous one under WSGI"
        )


def _from_django(
    handler: WebHandler | AsyncWebHandler, request: HttpRequest, path: str, context: Callable[[], Any]
) -> WebRequest:
    return WebRequest(
        str(request.method),
        f"{handler.prefix}/{path}",
        QueryParameters(_query_string(request)),
        {name.lower(): value for name, value in request.headers.items()},
        _read_body(request, handler.max_body + 1),  # one byte more than the handler accepts
        request,
        context,
        disconnect_of(request.META),
        REFUSALS,
    )


def _query_string(request: HttpRequest) -> bytes:
    encoding = "utf-8" if isinstance(request, ASGIRequest) else "latin-1"  # with which it was decoded
    return str(request.META.get("QUERY_STRING", "")).encode(encoding)


def _read_body(request: HttpRequest, limit: int) -> bytes:
    try:
        return bytes(request.read(limit))
    except UnreadablePostError:  # the client has disconnected; not an application error
        return b""


def _to_django(response: WebResponse | AsyncWebResponse) -> HttpResponseBase:
    headers = dict(response.headers)
    if isinstance(response.body, bytes):
        return HttpResponse(response.body, status=response.status, headers=headers)
    headers["Content-Encoding"] = "identity"  # keeps GZipMiddleware from buffering events
    return StreamingHttpResponse(response.body, status=response.status, headers=headers)


def _close_old_connections() -> None:
    if not in_any_test():  # Django would close a connection in a transaction
        close_old_connections()


@contextmanager
def _close_connections() -> Iterator[None]:
    """Close the connections that the source opened. Django closes connections at the end of requests only."""
    try:
        yield
    finally:
        if not in_any_test():  # the source has used the connection of the test
            connections.close_all()
