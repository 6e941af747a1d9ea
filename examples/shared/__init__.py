"""Code that the chat examples share: the page, its cookie and the model."""

import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DAY = 86400  # seconds

_FOLDER = Path(__file__).with_name("page")
# Python's `mimetypes` depends on the system, and a browser runs no module of another type.
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".mjs": "text/javascript"}
_CONTENTS = {
    path.relative_to(_FOLDER).as_posix(): path.read_bytes() for path in _FOLDER.rglob("*") if path.suffix in _TYPES
}

# The browser runs the files of the page alone, even if a text of a message were to be shown as HTML by mistake.
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types dompurify"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "private, no-cache",
}

_COOKIE = "browser"


def page_file(name: str = "index.html") -> tuple[bytes, dict[str, str]]:
    """Return the content of a file of the page and its HTTP headers.

    Raises:
        LookupError: There is no such file.
    """
    headers = {**PAGE_HEADERS, "Content-Type": f"{_TYPES[Path(name).suffix]}; charset=utf-8"}
    return _CONTENTS[name], headers


def browser_of(cookies: Mapping[str, str]) -> str | None:
    """Return the secret id of the browser that sends a request, or None without the cookie of the page.

    The conversations belong to it, since the chat has no users. With a login, return the id of the user instead.
    """
    value = cookies.get(_COOKIE, "")
    return value if re.fullmatch(r"[A-Za-z0-9_-]{43}", value) else None


def browser_cookie(cookies: Mapping[str, str]) -> dict[str, Any]:
    """Return the arguments of `set_cookie`, with which the page gives its browser an id, or lets it keep its own."""
    return {
        "key": _COOKIE,
        "value": browser_of(cookies) or secrets.token_urlsafe(32),
        "max_age": 30 * DAY,  # as long as a conversation is kept
        "httponly": True,
        "samesite": "lax",
    }
