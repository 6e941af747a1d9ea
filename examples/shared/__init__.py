"""What the chat examples have in common: the page, the model, and how the page sees a conversation."""

from pathlib import Path

PAGE = Path(__file__).with_name("page.html")
DAY = 86400  # seconds; how long answers and conversations are kept
