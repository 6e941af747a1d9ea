"""The buffer of a stream writer: accepted texts, their numbers, and those to be sent again unchanged. Pure."""

from __future__ import annotations

from collections.abc import Sequence


class WriteBuffer:
    """Texts that a writer has accepted and that are not known to be durable.

    A batch stays in the buffer while it is sent. If the outcome of its statement is unknown, its texts are in doubt:
    `next_batch` returns the same texts again, without later ones, until `confirm` is called. The server then recognises
    a batch that it has already stored.

    The buffer is not safe for concurrent use: the writer guards it with its mutex.

    Args:
        max_chunks: Most chunks that the buffer holds.
        max_bytes: Most bytes in UTF-8 that the buffer holds. An empty buffer accepts a chunk of any size.
    """

    def __init__(self, max_chunks: int, max_bytes: int) -> None:
        self.durable = 0  # the number of the last durable chunk
        self._max_chunks = max_chunks
        self._max_bytes = max_bytes
        self._texts: list[str] = []
        self._sizes: list[int] = []
        self._bytes = 0
        self._in_doubt = 0  # so many of the first texts are being sent, or were sent with an unknown outcome

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def last(self) -> int:
        """The number of the last accepted chunk."""
        return self.durable + len(self._texts)

    def add(self, text: str) -> bool:
        """Accept a text. Return False if the caller must wait until the buffer has room for it."""
        size = len(text.encode())
        if self._texts and (len(self._texts) >= self._max_chunks or self._bytes + size > self._max_bytes):
            return False
        self._texts.append(text)
        self._sizes.append(size)
        self._bytes += size
        return True

    def next_batch(self) -> Sequence[str]:
        """Return the texts to send now: those in doubt, or else all. They are in doubt until `confirm` is called."""
        batch = self._texts[: self._in_doubt or None]
        self._in_doubt = len(batch)
        return batch

    def confirm(self, durable: int) -> None:
        """Remove the batch that was sent last; `durable` is the number of its last chunk."""
        self._bytes -= sum(self._sizes[: self._in_doubt])
        del self._texts[: self._in_doubt], self._sizes[: self._in_doubt]
        self._in_doubt = 0
        self.durable = durable
