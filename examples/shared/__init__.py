"""Code that the chat examples share: the page, the model, housekeeping and the messages of a conversation."""

from pathlib import Path

PAGE = Path(__file__).with_name("page.html")
DAY = 86400  # seconds
