"""Minimal Django settings. The chat does not use Django's ORM, so no database is configured."""

import secrets

SECRET_KEY = secrets.token_hex()  # required, but unused
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "django_chat.urls"
MIDDLEWARE: list[str] = []  # the handler itself refuses requests from other sites, so no CSRF protection is needed
USE_TZ = True
