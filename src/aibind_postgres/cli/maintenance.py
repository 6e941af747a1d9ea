"""The commands that clean up: `cleanup`, `fail-abandoned` and `archive`."""

from __future__ import annotations

import json
import time

import typer

from .options import (
    ALL_TABLES,
    STREAM_TABLES,
    Every,
    Json,
    OlderThan,
    examples,
    with_target,
)
from .target import FAILED, Target, database, open_both_stores, open_store
from .text_output import printable

app = typer.Typer()


@app.command(epilog=examples("cleanup", "cleanup --every 10m"))
@with_target(*ALL_TABLES)
def cleanup(target: Target, every: Every = None, as_json: Json = False) -> None:
    """Delete expired streams and conversations.

    Active streams are kept: see fail-abandoned. Prints the numbers of deleted rows.

    With --every, each run opens a new connection. A failed run is reported, and the next run follows after the same
    time.
    """
    with database(target, check=False) as url:
        chosen = target._replace(dsn=url, embedded=False)
        while True:
            try:
                _clean_up(chosen, as_json)
            except typer.Exit as failure:
                if every is None or failure.exit_code != FAILED:
                    raise
            if every is None:
                return
            time.sleep(every)


def _clean_up(target: Target, as_json: bool) -> None:
    with open_both_stores(target) as (store, conversations):
        streams = store.cleanup()
        counts = {**streams._asdict(), "conversations": conversations.cleanup()}
    deleted = ", ".join(f"{name}: {count}" for name, count in counts.items())
    print(json.dumps(counts) if as_json else f"deleted {deleted}", flush=True)


@app.command("fail-abandoned", epilog=examples("fail-abandoned", "fail-abandoned --older-than 30m --json"))
@with_target(*STREAM_TABLES)
def fail_abandoned(
    target: Target,
    older_than: OlderThan = "10m",
    as_json: Json = False,
) -> None:
    """End the streams of dead producers in state error.

    These are the streams with an expired lease, and the streams without a lease that have got no chunk for the time of
    --older-than. Prints their ids. If a lease has expired, the command first waits at least 8 seconds, since a living
    producer renews its lease in this time.
    """
    with open_store(target) as store:
        ended = store.fail_abandoned(older_than)
        if as_json:
            print(json.dumps({"ids": ended}, ensure_ascii=False))
        else:
            print("".join(f"{printable(id)}\n" for id in ended), end="")


@app.command(epilog=examples("archive --older-than 7d"))
@with_target(*STREAM_TABLES)
def archive(
    target: Target,
    older_than: OlderThan = "1d",
    as_json: Json = False,
) -> None:
    """Move the chunks of finished streams to the archive.

    Prints the numbers of archived streams and moved chunks. The TypeScript package cannot read archived streams.
    """
    with open_store(target) as store:
        result = store.archive(older_than)
        text = f"archived streams: {result.streams}, chunks: {result.chunks}"
        print(json.dumps(result._asdict()) if as_json else text)
