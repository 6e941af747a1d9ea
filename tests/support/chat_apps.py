"""The chat of `tests/faults/_async/chats.py` as a web application. The module path has the folder of one flavour."""

from __future__ import annotations

from typing import Any

HEADER = "X-Stream-Id"


def starlette() -> Any:
    from chats import AsyncChat
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    from aibind_postgres.contrib.starlette import routes

    chat = AsyncChat()

    async def ask_worker(request: Request) -> Response:
        body = await request.json()
        stream_id = await chat.ask_worker(request.headers["user"], body["sessionId"], body["prompt"])
        return Response(status_code=202, headers={HEADER: stream_id})

    return Starlette(routes=[Route("/ask", ask_worker, methods=["POST"]), *routes(chat.handler)])


def flask() -> Any:
    from chats import Chat
    from flask import Flask, request

    from aibind_postgres.contrib.flask import blueprint

    app, chat = Flask(__name__), Chat()
    app.register_blueprint(blueprint(chat.handler))

    @app.post("/ask")
    def ask_worker() -> Any:
        body = request.get_json()
        stream_id = chat.ask_worker(request.headers["user"], body["sessionId"], body["prompt"])
        return "", 202, {HEADER: stream_id}

    return app
