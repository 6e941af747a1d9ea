"""Routes for Starlette and FastAPI."""

from __future__ import annotations

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from .. import AsyncStreamHandler, WebRequest
from ..web import QueryParameters

METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]  # the handler responds with 405 to the wrong one


def routes(handler: AsyncStreamHandler) -> list[Route]:
    """Return the routes of a handler.

    `WebRequest.original` is the Starlette request.

    Args:
        handler: The handler to route requests to.

    Returns:
        The routes, under the handler's prefix.

    Raises:
        TypeError: The handler is synchronous.

    Example:
        Starlette: `app = Starlette(routes=routes(handler))`
        FastAPI: `app.router.routes.extend(routes(handler))`
    """
    if not isinstance(handler, AsyncStreamHandler):
        raise TypeError(f"Starlette and FastAPI take an AsyncStreamHandler, not {type(handler).__name__}")

    async def answer(request: Request) -> Response:
        body = bytearray()
        try:
            async for part in request.stream():
                body += part
                if len(body) > handler.max_body:  # enough for the handler to refuse the request
                    break
        except ClientDisconnect:  # not an application error; the client does not receive this response
            return Response(status_code=400)
        response = await handler.handle(
            WebRequest(
                request.method,
                f"{handler.prefix}/{request.path_params['path']}",
                QueryParameters(request.scope["query_string"]),
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
