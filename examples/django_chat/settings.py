"""Django's settings: as few as a chat needs. Its tables are not Django's, so there is no database here."""

import secrets

SECRET_KEY = secrets.token_hex()  # nothing is signed with it
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "django_chat.urls"
MIDDLEWARE: list[str] = []  # no cookies, so no forged requests
USE_TZ = True
