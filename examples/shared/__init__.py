"""Code that the chat examples share: the page, the model, housekeeping and the messages of a conversation."""

import re
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

PAGE = Path(__file__).with_name("page.html")
DAY = 86400  # seconds


def _source_of(element: str) -> str:
    """Return the hash of an inline script or style, in the form of a Content-Security-Policy."""
    [text] = re.findall(f"<{element}[^>]*>(.*?)</{element}>", PAGE.read_text("utf-8"), re.DOTALL)
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


# The browser runs the page's own script alone, even if a text of a message were to be shown as HTML by mistake.
PAGE_HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {_source_of('script')}; style-src {_source_of('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
}
