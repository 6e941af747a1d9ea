"""Reader process of the demonstration: prints each chunk and its sequence number as a line of JSON."""

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
