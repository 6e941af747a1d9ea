"""Starlette: `Starlette(routes=routes(handler))`, and FastAPI: `app.router.routes.extend(routes(handler))`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from .. import AsyncStreamHandler, WebRequest

if TYPE_CHECKING:
    from starlette.requests import Request

METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]  # those that are wrong are told so


def routes(handler: AsyncStreamHandler) -> list[Route]:
    """Return the routes of a handler. The request that `generate` and `authorize` get as `original` is Starlette's.

    Raises `TypeError` for a synchronous handler.
    """
    if not isinstance(handler, AsyncStreamHandler):
        raise TypeError(f"Starlette and FastAPI take an AsyncStreamHandler, not {type(handler).__name__}")

    async def answer(request: Request) -> Response:
        body = bytearray()
        try:
            async for part in request.stream():
                body += part
                if len(body) > handler.max_body:  # the handler refuses it, so the rest need not be read
                    break
        except ClientDisconnect:  # no fault of the application, and nobody is left to be told
            return Response(status_code=400)
        response = await handler.handle(
            WebRequest(
                request.method,
                f"{handler.prefix}/{request.path_params['path']}",
                dict(request.query_params),
                dict(request.headers),
                bytes(body),
                request,
            )
        )
        headers = dict(response.headers)
        if isinstance(response.body, bytes):
            return Response(response.body, response.status, headers)
        return StreamingResponse(response.body, response.status, headers)

    return [Route(f"{handler.prefix}/{{path:path}}", answer, methods=METHODS, name="aibind")]
