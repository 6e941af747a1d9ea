"""A chat in Flask. Its answers survive a reload and a lost connection.

If the web server restarts, the text so far is kept.

pip install 'aibind-postgres[binary,flask]' gunicorn
DATABASE_URL=postgresql://… gunicorn --chdir examples --threads 100 flask_chat:app

Each reader occupies a thread, so start more threads than readers.
"""

import os
from collections.abc import Iterator
from typing import Any

from flask import Flask, Response, abort
from shared import DAY, another_answer, housekeeping, messages, page_file
from shared.model import answer

from aibind_postgres import (
    Generation,
    PostgresConversationStore,
    PostgresStreamStore,
    StreamHandler,
    schema,
)
from aibind_postgres.contrib.flask import blueprint

DSN = os.environ["DATABASE_URL"]
schema.migrate(DSN)  # in production, run this when you deploy
store = PostgresStreamStore(DSN, ttl=DAY)
conversations = PostgresConversationStore(DSN, ttl=30 * DAY)
housekeeping.start(DSN)


def generate(generation: Generation) -> Iterator[str]:
    return answer(generation.messages)


app = Flask(__name__)
# Anyone with the id of a conversation can read and change it. Pass authorize=… to restrict that.
app.register_blueprint(blueprint(StreamHandler(generate, store=store, conversations=conversations, public=True)))


@app.get("/")
@app.get("/page/<path:name>")
def page(name: str = "index.html") -> Response:
    try:
        content, headers = page_file(name)
    except LookupError:
        abort(404)
    return Response(content, headers=headers)


@app.get("/conversation/<session>")
def conversation(session: str) -> list[dict[str, Any]]:
    try:
        return messages.current_path(conversations.load(session))
    except ValueError:  # an invalid id
        abort(404)


@app.delete("/conversation/<session>")
def delete(session: str) -> dict[str, bool]:
    try:
        return {"ok": conversations.delete(session)}
    except ValueError:
        abort(404)


@app.post("/conversation/<session>/answer/<id>")
def answer_again(session: str, id: str) -> dict[str, str]:
    try:
        return {"id": another_answer.start(store, conversations, session, id)}
    except (LookupError, ValueError):
        abort(404)


@app.post("/conversation/<session>/<action>/<id>")
def change(session: str, action: str, id: str) -> list[dict[str, Any]]:
    try:
        with conversations.edit(session) as chat:
            return messages.change(chat, action, id)
    except (LookupError, ValueError):
        abort(404)
