"""List stored streams, or show one stream: its text at the recorded pace, or its chunks with their times.

The variable DATABASE_URL contains the connection string.
"""

import argparse
import os
import sys
from datetime import datetime, timezone

import psycopg

from aibind_postgres import AibindError, PostgresStreamStore
from aibind_postgres.models import event_of

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("id", nargs="?", help="the stream to show; by default, the streams are listed, the newest last")
parser.add_argument("--owner", help="list the streams of this owner")
parser.add_argument("--session", help="list the streams of this conversation")
parser.add_argument("--speed", type=float, default=1, help="2 is twice as fast, inf has no pauses; 1 by default")
parser.add_argument("--times", action="store_true", help="print the time, event and data of each chunk, without pauses")


def print_list(store: PostgresStreamStore, owner: str | None, session: str | None) -> None:
    beginning = datetime(1970, 1, 1, tzinfo=timezone.utc)  # with a time, the list is in the order of creation
    for stream in store.list(owner=owner, session_id=session, created_after=beginning):
        details = stream.state, stream.total_chunks, stream.owner, stream.session_id
        print(stream.created_at, stream.id, *details, sep="  ")


def print_times(store: PostgresStreamStore, stream_id: str) -> None:
    for chunk in store.read_with_times(stream_id):
        event, data = event_of(chunk.data)
        print(chunk.created_at, event, repr(data))


def replay(store: PostgresStreamStore, stream_id: str, speed: float) -> None:
    for chunk in store.replay(stream_id, speed=speed):
        event, data = event_of(chunk.data)
        if event == "message":  # replace this with your application's code
            print(data, end="", flush=True)


def main(arguments: argparse.Namespace) -> None:
    with PostgresStreamStore(os.environ["DATABASE_URL"]) as store:
        if arguments.id is None:
            print_list(store, arguments.owner, arguments.session)
        elif arguments.times:
            print_times(store, arguments.id)
        else:
            replay(store, arguments.id, arguments.speed)


if __name__ == "__main__":
    try:
        main(parser.parse_args())
    except (AibindError, ValueError, psycopg.Error) as error:
        sys.exit(f"{error}")
