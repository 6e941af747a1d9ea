"""Django: `urlpatterns = [*urlpatterns(handler)]`, with the asynchronous handler under ASGI, the other under WSGI."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from django.http import HttpResponse, StreamingHttpResponse
from django.urls import re_path
from django.views.decorators.csrf import csrf_exempt

from .. import AsyncStreamHandler, AsyncWebResponse, StreamHandler, WebRequest, WebResponse

if TYPE_CHECKING:
    from django.http import HttpRequest
    from django.http.response import HttpResponseBase
    from django.urls import URLPattern


def urlpatterns(handler: StreamHandler | AsyncStreamHandler) -> list[URLPattern]:
    """Return the URL patterns of a handler, to be put at the root.

    The request that `generate` and `authorize` get as `original` is Django's own. Under the other kind of server than
    the handler's, Django would hold an answer back until it is complete. The views are exempt from the CSRF check, for
    which aibind's browser client sends no token: see `authorize`, and to it that session cookies are SameSite.
    """
    if isinstance(handler, AsyncStreamHandler):
        asynchronous = handler

        async def view(request: HttpRequest, path: str) -> HttpResponseBase:
            return _answer(await asynchronous.handle(_asked(asynchronous, request, path)))
    else:
        synchronous = handler

        def view(request: HttpRequest, path: str) -> HttpResponseBase:  # type: ignore[misc]  # one name, two flavours
            return _answer(synchronous.handle(_asked(synchronous, request, path)))

    root = re.escape(f"{handler.prefix}/"[1:])
    return [re_path(f"^{root}(?P<path>.*)$", csrf_exempt(view), name="aibind")]


def _asked(handler: StreamHandler | AsyncStreamHandler, request: HttpRequest, path: str) -> WebRequest:
    return WebRequest(
        str(request.method),
        f"{handler.prefix}/{path}",
        request.GET.dict(),
        {name.lower(): value for name, value in request.headers.items()},
        request.read(handler.max_body + 1),  # the handler refuses what is longer
        request,
    )


def _answer(response: WebResponse | AsyncWebResponse) -> HttpResponseBase:
    kind = HttpResponse if isinstance(response.body, bytes) else StreamingHttpResponse
    return kind(response.body, status=response.status, headers=dict(response.headers))
