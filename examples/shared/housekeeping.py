"""Fail the streams of dead processes and delete expired rows, every 5 seconds."""

import logging
import threading
import time

from aibind_postgres import PostgresConversationStore, PostgresStreamStore

from .model import LONGEST_PAUSE


def start(dsn: str) -> None:
    """Start a housekeeping thread. Safe to run in every process.

    The thread opens its own stores, since stores of this process must not be used after a fork.
    """

    def run() -> None:
        with PostgresStreamStore(dsn) as store, PostgresConversationStore(dsn) as conversations:
            while True:
                time.sleep(5)
                try:
                    store.fail_abandoned(LONGEST_PAUSE)
                    store.cleanup()
                    conversations.cleanup()
                except Exception:
                    logging.exception("housekeeping failed")

    threading.Thread(target=run, name="housekeeping", daemon=True).start()
