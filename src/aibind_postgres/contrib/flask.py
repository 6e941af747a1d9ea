"""Flask: `app.register_blueprint(blueprint(handler))`."""

from __future__ import annotations

from flask import Blueprint, Response, current_app, request

from .. import StreamHandler, WebRequest

METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]  # those that are wrong are told so


def blueprint(handler: StreamHandler) -> Blueprint:
    """Return a blueprint with the routes of a handler.

    The request that `generate` and `authorize` get as `original` is Flask's own. A generator whose text becomes
    a stream runs in an application context of its own, with a `g` of its own, which is torn down when it ends. Each
    reader takes a thread of the server while he reads: use workers with threads. Raises `TypeError` for an asynchronous
    handler.
    """
    if not isinstance(handler, StreamHandler):
        raise TypeError(f"Flask takes a StreamHandler, not {type(handler).__name__}")
    name = "aibind" if handler.prefix == "/__aibind__" else f"aibind at {handler.prefix.replace('.', ' ')}"
    made = Blueprint(name, __name__, url_prefix=handler.prefix or None)

    @made.route("/<path:path>", methods=METHODS)
    def answer(path: str) -> Response:
        original = request._get_current_object()  # type: ignore[attr-defined]  # a thread of a producer has no other
        response = handler.handle(
            WebRequest(
                request.method,
                f"{handler.prefix}/{path}",
                request.args.to_dict(),
                {name.lower(): value for name, value in request.headers},
                _body(handler.max_body),
                original,
                current_app.app_context,
            )
        )
        return Response(response.body, response.status, dict(response.headers))

    return made


def _body(longest: int) -> bytes:
    length = request.content_length
    try:
        if length is not None and length <= longest:
            return request.get_data()  # which others may have asked for before
        return request.stream.read(longest + 1)  # the handler refuses what is longer
    except OSError:  # the client has gone away: no fault of the application, and nobody is left to be told
        return b""
