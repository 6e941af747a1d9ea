"""Code that the chat examples share: the page, the model, housekeeping and the messages of a conversation."""

from pathlib import Path

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
    "Cache-Control": "no-cache",
}


def page_file(name: str = "index.html") -> tuple[bytes, dict[str, str]]:
    """Return the content of a file of the page and its HTTP headers.

    Raises:
        LookupError: There is no such file.
    """
    headers = {**PAGE_HEADERS, "Content-Type": f"{_TYPES[Path(name).suffix]}; charset=utf-8"}
    return _CONTENTS[name], headers
