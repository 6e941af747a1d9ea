"""Flask: `app.register_blueprint(blueprint(handler))`."""

from __future__ import annotations

from flask import Blueprint, Response, request

from .. import StreamHandler, WebRequest

METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]  # those that are wrong are told so


def blueprint(handler: StreamHandler) -> Blueprint:
    """Return a blueprint with the routes of a handler.

    The request that `generate` and `authorize` get as `original` is Flask's own. Each reader takes a thread of the
    server while he reads: use workers with threads.
    """
    name = "aibind" if handler.prefix == "/__aibind__" else f"aibind at {handler.prefix.replace('.', ' ')}"
    made = Blueprint(name, __name__, url_prefix=handler.prefix or None)

    @made.route("/<path:path>", methods=METHODS)
    def answer(path: str) -> Response:
        original = request._get_current_object()  # type: ignore[attr-defined]  # a thread of a producer has no other
        length = request.content_length
        if length is not None and length <= handler.max_body:
            body = request.get_data()  # which others may have asked for before
        else:
            body = request.stream.read(handler.max_body + 1)  # the handler refuses what is longer
        response = handler.handle(
            WebRequest(
                request.method,
                f"{handler.prefix}/{path}",
                request.args.to_dict(),
                {name.lower(): value for name, value in request.headers},
                body,
                original,
            )
        )
        return Response(response.body, response.status, dict(response.headers))

    return made
