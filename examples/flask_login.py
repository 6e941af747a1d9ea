"""Chats with a login in Flask. Each user has access to their own conversations and answers only.

pip install 'aibind-postgres[binary,cli,flask]' gunicorn
export SECRET_KEY=… DATABASE_URL=postgresql://…
aibind-postgres migrate && gunicorn --chdir examples --workers 2 --threads 100 flask_login:app

The users are ann (password: apple) and bob (password: banana). Log in with a JSON body, which pages of other
sites cannot send. Behind HTTPS, set SESSION_COOKIE_SECURE as well.
"""

import os
import time
from collections.abc import Iterator

from flask import Flask, Response, abort, request, session
from werkzeug.security import check_password_hash

from aibind_postgres import Generation, Housekeeper, PostgresConversationStore, PostgresStreamStore, StreamHandler
from aibind_postgres.contrib.flask import blueprint

PASSWORDS = {  # made by werkzeug.security.generate_password_hash
    "ann": "pbkdf2:sha256:600000$zQBmkgxPnq11$a2f5af0a3a0c9a67d77d405cf4e8bf2dbb0d1d64d9784109c16c004b3158c445",
    "bob": "pbkdf2:sha256:600000$KbBVyEhexQbh$82c448a60ec5822ea08f55dfb667764d6f39b5139f944f3491433cf7dff80c9c",
}
store = PostgresStreamStore(os.environ["DATABASE_URL"])
conversations = PostgresConversationStore(os.environ["DATABASE_URL"], ttl=None)
Housekeeper(store, conversations).start()


def current_user(_: object) -> str:
    user: str | None = session.get("user")
    return user or abort(401)  # with None, anyone could start answers outside conversations


def generate(generation: Generation) -> Iterator[str]:
    # When the generator runs, the question is saved, so the conversation exists.
    info = conversations.get_info(generation.session_id) if generation.session_id else None
    if generation.kind == "stream" and info is not None and info.title is None:
        conversations.describe(info.session_id, title=generation.prompt[:60])
    for word in f"{generation.owner}, you asked: {generation.prompt}".split():  # replace this with your model
        yield f"{word} "
        time.sleep(0.1)


app = Flask(__name__)
app.config.update(SECRET_KEY=os.environ["SECRET_KEY"], SESSION_COOKIE_SAMESITE="Lax")
app.register_blueprint(blueprint(StreamHandler(generate, store=store, conversations=conversations, owner=current_user)))


@app.route("/session", methods=["POST", "DELETE"])
def change_session() -> Response:
    """Log in with POST, log out with DELETE."""
    session.clear()
    if request.method == "POST":
        name, password = str(request.get_json().get("name")), str(request.get_json().get("password"))
        # An unknown name takes the same time as a wrong password.
        if not check_password_hash(PASSWORDS.get(name, PASSWORDS["ann"]), password) or name not in PASSWORDS:
            abort(401)
        session["user"] = name
    return Response(status=204)
