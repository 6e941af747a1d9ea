"""A blueprint for Flask."""

from __future__ import annotations

from flask import Blueprint, Response, current_app, request
from flask.blueprints import BlueprintSetupState
from werkzeug.exceptions import HTTPException
from werkzeug.routing import PathConverter

from .._sync.web_handler import WebHandler
from ..web import QueryParameters, WebRequest
from ._wsgi import disconnect_of

METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]  # the handler responds with 405 to the wrong one


class _AnyPath(PathConverter):
    """A rest of a path that may contain line breaks, as the id of a conversation may."""

    regex = "(?s:[^/].*)"


def blueprint(handler: WebHandler) -> Blueprint:
    """Return a blueprint with the routes of a handler.

    `WebRequest.original` is the Flask request. The generator of a durable stream runs in a separate application context
    with a separate `g`. That context is torn down when the generator ends.

    Each reader occupies a server thread while it reads. Use a server with many threads.

    Args:
        handler: The handler to route requests to.

    Returns:
        The blueprint. Blueprints of handlers with different prefixes have different names, so one application can
        register several.

    Raises:
        TypeError: The handler is asynchronous.

    Example:
        `app.register_blueprint(blueprint(handler))`
    """
    if not isinstance(handler, WebHandler):
        raise TypeError(f"Flask takes a synchronous handler, not {type(handler).__name__}")
    name = "aibind" if handler.prefix == "/__aibind__" else f"aibind at {handler.prefix.replace('.', ' ')}"
    result = Blueprint(name, __name__, url_prefix=handler.prefix or None)

    @result.record
    def add_converter(state: BlueprintSetupState) -> None:
        state.app.url_map.converters["aibind_path"] = _AnyPath

    @result.route("" if handler.prefix else "/", methods=METHODS)
    @result.route("/<aibind_path:path>", methods=METHODS)
    def answer(path: str = "") -> Response:
        original = request._get_current_object()  # type: ignore[attr-defined]  # the proxy fails in a producer's thread
        response = handler.handle(
            WebRequest(
                request.method,
                f"{handler.prefix}/{path}",
                QueryParameters(request.query_string),
                {name.lower(): value for name, value in request.headers},
                _read_body(handler.max_body),
                original,
                current_app.app_context,
                disconnect_of(request.environ),
                (HTTPException,),
            )
        )
        return Response(response.body, response.status, dict(response.headers))

    return result


def _read_body(limit: int) -> bytes:
    length = request.content_length
    try:
        if length is not None and length <= limit:
            return request.get_data()  # cached, so it works after middleware has read the body
        return request.stream.read(limit + 1)  # one byte more than the handler accepts
    except OSError:  # the client has disconnected; not an application error
        return b""
