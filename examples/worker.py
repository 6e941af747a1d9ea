"""Write the answer of one stream, which a web process has created with `store.create(lease=60)`.

Usage: python examples/worker.py DSN ID PROMPT     SIGTERM ends the stream in state error
"""

import signal
import sys
import time
from collections.abc import Iterator

from aibind_postgres import AibindError, DurableStream, PostgresStreamStore


def generate(prompt: str) -> Iterator[str]:
    # Replace this with your model.
    for word in f"You have asked: {prompt}".split():
        yield f"{word} "
        time.sleep(0.1)


def main(dsn: str, stream_id: str, prompt: str) -> None:
    # By default, SIGTERM kills the process at once, and readers learn the end only when the lease has expired.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    with PostgresStreamStore(dsn) as store:
        print(DurableStream.produce(store, stream_id, generate(prompt), idle_timeout=60).state)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except AibindError as error:
        sys.exit(f"{error}")
