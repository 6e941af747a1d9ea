"""Routes for Starlette."""

from __future__ import annotations

from starlette.convertors import PathConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from .._async.web_handler import AsyncWebHandler
from ..web import QueryParameters, WebRequest


class _AnyPath(PathConvertor):
    """A rest of a path that may contain line breaks, as the id of a conversation may."""

    regex = "(?s:.*)"


ANY_PATH = "aibind_path"
register_url_convertor(ANY_PATH, _AnyPath())

METHODS = ["GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"]  # the handler responds with 405 to the wrong one


def routes(handler: AsyncWebHandler) -> list[Route]:
    """Return the routes of a handler. For FastAPI, `contrib.fastapi` has a router.

    `WebRequest.original` is the Starlette request.

    Args:
        handler: The handler to route requests to.

    Returns:
        The routes, under the handler's prefix.

    Raises:
        TypeError: The handler is synchronous.

    Example:
        `app = Starlette(routes=routes(handler))`
    """
    check_flavour(handler)

    async def answer(request: Request) -> Response:
        return await respond(handler, request, f"/{request.path_params.get('path', '')}")

    paths = (handler.prefix or "/", f"{handler.prefix}/{{path:{ANY_PATH}}}")
    return [Route(path, answer, methods=METHODS, name="aibind") for path in paths]


def check_flavour(handler: AsyncWebHandler) -> None:
    """Raise `TypeError` if a handler is synchronous."""
    if not isinstance(handler, AsyncWebHandler):
        raise TypeError(f"Starlette and FastAPI take an asynchronous handler, not {type(handler).__name__}")


async def respond(handler: AsyncWebHandler, request: Request, path: str) -> Response:
    """Return the response of a handler to a request for a path below the handler's prefix."""
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
            handler.prefix + path,
            QueryParameters(request.scope["query_string"]),
            dict(request.headers),
            bytes(body),
            request,
            refusals=(HTTPException,),
        )
    )
    headers = dict(response.headers)
    if isinstance(response.body, bytes):
        return Response(response.body, response.status, headers)
    return StreamingResponse(response.body, response.status, headers)
