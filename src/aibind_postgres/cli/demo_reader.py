"""One reader of the demonstration, in a process of its own: it reports each chunk with its number as a line of JSON."""

import json
import os
import sys

from .._sync.stream_store import PostgresStreamStore

if __name__ == "__main__":
    stream_id, after, chunks_table, status_table = sys.argv[1:]
    dsn = os.environ["DATABASE_URL"]
    with PostgresStreamStore(dsn, chunks_table=chunks_table, status_table=status_table) as store:
        for chunk in store.read_from(stream_id, int(after)):
            print(json.dumps(chunk), flush=True)
