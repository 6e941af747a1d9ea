"""What somebody must do every few seconds: end the answers whose process has died, delete what has expired."""

import logging
import threading
import time

from aibind_postgres import PostgresConversationStore, PostgresStreamStore

from .model import LONGEST_PAUSE


def start(dsn: str) -> None:
    """Do it in a thread, with stores of its own: the process may yet fork. Many processes may do so at once."""

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
