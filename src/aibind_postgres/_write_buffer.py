"""The buffer of a stream writer. It repeats a batch unchanged if its outcome is unknown. Pure."""

from __future__ import annotations

from collections.abc import Sequence


class WriteBuffer:
    """Holds the texts that a writer has accepted and that are not known to be durable.

    A batch stays in the buffer while it is sent. Until `confirm` is called, its texts are in doubt, and `next_batch`
    returns exactly these texts again. An append of the same texts with the same sequence number writes nothing twice.

    The buffer is not safe for concurrent use: the sender guards it with its mutex.

    Args:
        max_chunks: The maximum number of chunks.
        max_bytes: The maximum size in bytes of UTF-8. An empty buffer accepts a chunk of any size.
    """

    def __init__(self, max_chunks: int, max_bytes: int) -> None:
        self.durable = 0  # the sequence number of the last durable chunk
        self._max_chunks = max_chunks
        self._max_bytes = max_bytes
        self._texts: list[str] = []
        self._sizes: list[int] = []
        self._bytes = 0
        self._in_doubt = 0  # the number of texts, from the first on, that are being sent or have an unknown outcome

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def last(self) -> int:
        """The sequence number of the last accepted chunk."""
        return self.durable + len(self._texts)

    def add(self, text: str) -> bool:
        """Add a text. Return False if the buffer is full: the caller must wait."""
        size = len(text.encode())
        if self._texts and (len(self._texts) >= self._max_chunks or self._bytes + size > self._max_bytes):
            return False
        self._texts.append(text)
        self._sizes.append(size)
        self._bytes += size
        return True

    def next_batch(self) -> Sequence[str]:
        """Return the texts in doubt, or all texts if none is. The returned texts are then in doubt."""
        batch = self._texts[: self._in_doubt or None]
        self._in_doubt = len(batch)
        return batch

    def confirm(self, durable: int) -> None:
        """Remove the texts in doubt. `durable` is the sequence number of the last one."""
        self._bytes -= sum(self._sizes[: self._in_doubt])
        del self._texts[: self._in_doubt], self._sizes[: self._in_doubt]
        self._in_doubt = 0
        self.durable = durable
