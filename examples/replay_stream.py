"""Replay the text of a stored stream at its recorded pace, for tests and demos.

Usage: python examples/replay_stream.py DSN ID [SPEED]     SPEED: 2 is twice as fast, inf has no pauses, default 1
"""

import sys

import psycopg

from aibind_postgres import AibindError, PostgresStreamStore
from aibind_postgres.models import event_of


def main(dsn: str, stream_id: str, speed: str = "1") -> None:
    with PostgresStreamStore(dsn) as store:
        for chunk in store.replay(stream_id, speed=float(speed)):
            event, data = event_of(chunk.data)
            if event == "message":  # replace this with your application's code
                print(data, end="", flush=True)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except (AibindError, ValueError, psycopg.Error) as error:
        sys.exit(f"{error}")
