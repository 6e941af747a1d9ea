"""What a program that ends leaves of the streams that it was writing."""

from __future__ import annotations

import pytest
from support.lifecycles import run_to_the_end

from aibind_postgres import PostgresStreamStore

PROGRAM = """
import sys, threading
from aibind_postgres import DurableStream, PostgresConversationStore, PostgresStreamStore

store = PostgresStreamStore(sys.argv[1])
blocked = threading.Event()

def source():
    yield "half"
    blocked.set()
    threading.Event().wait()

def finish(text, status):
    print(text, status.state, flush=True)

DurableStream.start(store, source(), id="s", on_finish=finish)
blocked.wait()
list(zip(range(1), store.read_from("s")))
{end}
"""


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise ValueError", "store.close()"])
def test_a_program_that_ends_breaks_off_what_it_writes(database, end):
    exit_code, said, complaint = run_to_the_end(PROGRAM.replace("{end}", end), database)
    assert said == "half error\n", complaint
    assert exit_code == {"sys.exit(3)": 3, "raise ValueError": 1}.get(end, 0)
    with PostgresStreamStore(database) as store:
        assert store.get_status("s") == ("error", "the answer broke off", 1)
