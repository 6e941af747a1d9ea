"""Which requests a handler refuses by their headers."""

from __future__ import annotations

import pytest

from aibind_postgres.web import is_cross_site, is_json, parse_origins

HOST = "chat.example.com"
OWN = "https://chat.example.com"
ALLOWED = parse_origins(["https://App.Example.com", "http://localhost:5173", "capacitor://localhost"])


@pytest.mark.parametrize(
    ("site", "origin", "host", "refused"),
    [
        # No browser.
        (None, None, HOST, False),
        (None, None, None, False),
        # A browser that sends `Sec-Fetch-Site`: a proxy may have changed Host.
        ("same-origin", OWN, HOST, False),
        ("same-origin", OWN, "backend:8000", False),
        ("same-origin", None, HOST, False),
        ("none", None, HOST, False),
        ("same-site", "https://evil.example.com", HOST, True),
        ("same-site", "https://chat.example.com:8443", HOST, True),
        ("same-site", None, HOST, True),
        ("cross-site", "https://evil.test", HOST, True),
        ("cross-site", "null", HOST, True),
        ("cross-site", None, HOST, True),
        ("cross-site", OWN, HOST, True),
        ("", OWN, HOST, True),
        ("unknown", OWN, HOST, True),
        # A browser that sends `Origin` alone: an old one, or a server without HTTPS.
        (None, OWN, HOST, False),
        (None, "http://chat.example.com", HOST, False),
        (None, "HTTPS://CHAT.example.com", "Chat.Example.COM", False),
        (None, OWN, "chat.example.com:443", False),
        (None, "http://chat.example.com", "chat.example.com:80", False),
        (None, "http://chat.example.com:8000", "chat.example.com:8000", False),
        (None, "http://[::1]:8000", "[::1]:8000", False),
        (None, "http://[::1]", "[::1]:80", False),
        (None, "http://chat.example.com:8000", "chat.example.com:9000", True),
        (None, "http://chat.example.com", "chat.example.com:8000", True),
        (None, OWN, "chat.example.com:80", True),
        (None, OWN, "backend:8000", True),
        (None, OWN, None, True),
        (None, "https://evil.test", HOST, True),
        (None, "https://evil.chat.example.com", HOST, True),
        (None, "https://chat.example.com.evil.test", HOST, True),
        (None, "https://evil.test, https://chat.example.com", HOST, True),
        (None, "null", HOST, True),
        (None, "null", "null", True),
        (None, "", "", True),
        (None, "chat.example.com", HOST, True),
        # An allowed origin.
        ("same-site", "https://app.example.com", HOST, False),
        ("cross-site", "http://localhost:5173", HOST, False),
        ("cross-site", "capacitor://localhost", HOST, False),
        (None, "https://APP.example.com", HOST, False),
        ("cross-site", "http://app.example.com", HOST, True),
        ("cross-site", "https://app.example.com:8443", HOST, True),
        ("cross-site", "http://localhost:51730", HOST, True),
    ],
)
def test_cross_site_requests(site: str | None, origin: str | None, host: str | None, refused: bool) -> None:
    sent = {"sec-fetch-site": site, "origin": origin, "host": host}
    headers = {name: value for name, value in sent.items() if value is not None}
    assert is_cross_site(headers, ALLOWED) is refused


@pytest.mark.parametrize(
    "origin",
    ["", "null", "*", "https://*.example.com", "example.com", "https://example.com/", "https://a@b", "https://"],
)
def test_text_that_is_not_an_origin_raises(origin: str) -> None:
    with pytest.raises(ValueError, match="allowed_origins must contain origins such as"):
        parse_origins([origin])


def test_single_text_in_place_of_a_collection_raises() -> None:
    with pytest.raises(ValueError, match="not the text"):
        parse_origins("https://example.com")


@pytest.mark.parametrize(
    ("content_type", "accepted"),
    [
        ("application/json", True),
        ("Application/JSON ; charset=utf-8", True),
        # These need no preflight.
        (None, False),
        ("", False),
        ("text/plain", False),
        ("text/plain; application/json", False),
        ("application/x-www-form-urlencoded", False),
        ("multipart/form-data; boundary=application/json", False),
        ("text/plain, application/json", False),
        ("application/jsonp", False),
    ],
)
def test_content_types(content_type: str | None, accepted: bool) -> None:
    assert is_json({} if content_type is None else {"content-type": content_type}) is accepted
