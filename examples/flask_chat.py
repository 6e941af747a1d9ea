"""A chat in Flask whose answers survive a reload, a lost network and a restart of the server.

pip install 'aibind-postgres[binary,flask]' gunicorn
DATABASE_URL=postgresql://… gunicorn --chdir examples --threads 100 flask_chat:app

Each reader takes a thread while he reads, so have more of them than readers.
"""

import os
from collections.abc import Iterator
from typing import Any

from flask import Flask, Response, abort, send_file
from shared import DAY, PAGE, housekeeping, turns
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
schema.migrate(DSN)  # an application of yours would do so when it is deployed
store = PostgresStreamStore(DSN, ttl=DAY)
conversations = PostgresConversationStore(DSN, ttl=30 * DAY)
housekeeping.start(DSN)


def generate(generation: Generation) -> Iterator[str]:
    return answer(generation.messages)


app = Flask(__name__)
# Who knows the id of a conversation may read and write it here; authorize=… asks who is there.
app.register_blueprint(blueprint(StreamHandler(generate, store=store, conversations=conversations)))


@app.get("/")
def page() -> Response:
    return send_file(PAGE)


@app.get("/conversation/<session>")
def conversation(session: str) -> list[dict[str, Any]]:
    try:
        return turns.shown(conversations.load(session))
    except ValueError:  # no id that a conversation can have
        abort(404)


@app.post("/conversation/<session>/<action>/<id>")
def change(session: str, action: str, id: str) -> list[dict[str, Any]]:
    try:
        with conversations.edit(session) as chat:
            return turns.change(chat, action, id)
    except (LookupError, ValueError):
        abort(404)
