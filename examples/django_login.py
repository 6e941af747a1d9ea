"""Chats with Django's own users, in one file. It needs the variables SECRET_KEY and DATABASE_URL.

Run `django_login.py migrate`, `django_login.py createsuperuser` and `gunicorn --threads 100 django_login:application`.
"""

import os
from collections.abc import Iterator

from django import conf, http, urls
from django.contrib.auth import authenticate, login, logout
from django.core import management, wsgi
from django.middleware.csrf import get_token
from psycopg.conninfo import conninfo_to_dict

import aibind_postgres as aibind
from aibind_postgres.contrib import django as app

server = conninfo_to_dict(os.environ["DATABASE_URL"])
SESSIONS = "django.contrib.sessions.middleware.SessionMiddleware"
USERS = "django.contrib.auth.middleware.AuthenticationMiddleware"
conf.settings.configure(
    SECRET_KEY=os.environ["SECRET_KEY"],
    ALLOWED_HOSTS=["127.0.0.1", "localhost"],
    ROOT_URLCONF=__name__,
    DATABASES={"default": {"ENGINE": "django.db.backends.postgresql", "NAME": server.pop("dbname"), "OPTIONS": server}},
    INSTALLED_APPS=[f"django.contrib.{name}" for name in ("auth", "contenttypes", "sessions")] + [app.__name__],
    MIDDLEWARE=[SESSIONS, "django.middleware.csrf.CsrfViewMiddleware", USERS],
)
store = app.stream_store()
conversations = app.conversation_store(ttl=None)


def current_user(request: aibind.WebRequest) -> str:
    if not request.original.user.is_authenticated:
        raise aibind.WebError(401, "log in first")  # None would let anyone start answers outside conversations
    return str(request.original.user.pk)


def generate(generation: aibind.Generation) -> Iterator[str]:
    for word in f"You asked: {generation.prompt}".split():  # replace this with your model
        yield f"{word} "


def session(request: http.HttpRequest) -> http.HttpResponse:
    """Log in with POST, log out with DELETE. The response is the CSRF token, for the header X-CSRFToken."""
    user = authenticate(request, username=request.POST.get("username"), password=request.POST.get("password"))
    if user is not None:
        login(request, user)
    elif request.method != "GET":  # DELETE, or a wrong password
        logout(request)
    return http.HttpResponse(get_token(request), status=401 if request.POST and user is None else 200)


handler = aibind.StreamHandler(generate, store=store, conversations=conversations, owner=current_user)
urlpatterns = [urls.path("session", session), *app.urlpatterns(handler)]
application = wsgi.get_wsgi_application()
if __name__ == "__main__":
    management.execute_from_command_line()
else:
    aibind.Housekeeper(store, conversations).start()
