"""What a program that ends leaves of the streams that it was writing."""

from __future__ import annotations

import threading

import pytest
from support.lifecycles import in_a_child, run_to_the_end

from aibind_postgres import DurableStream, PostgresStreamStore
from aibind_postgres._sync.producing import Producer

PROGRAM = """
import sys, threading
from aibind_postgres import DurableStream, PostgresStreamStore
from aibind_postgres._sync import producing

producing.LAST_WORDS = 20.0  # on a busy machine
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


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_has_none_of_it_to_end(database):
    over = threading.Event()

    def source():
        yield "half"
        over.wait()

    with PostgresStreamStore(database) as store:
        stream = DurableStream.start(store, source())
        next(store.read_from(stream.id))
        with Producer._mutex:  # in the middle of something
            assert in_a_child(lambda: len(Producer.writing())) == "0"
        assert Producer.writing(store) == [stream._producer]
        over.set()
        assert stream.wait(20).state == "done"
