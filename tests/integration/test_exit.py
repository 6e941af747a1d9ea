"""Streams that a program still produces when it ends, and producers in a forked process."""

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

producing.SHUTDOWN_GRACE = 20.0  # the machine may be busy
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
def test_end_of_the_program_ends_its_streams(database, end):
    exit_code, output, errors = run_to_the_end(PROGRAM.replace("{end}", end), database)
    assert output == "half error\n", errors
    assert exit_code == {"sys.exit(3)": 3, "raise ValueError": 1}.get(end, 0)
    with PostgresStreamStore(database) as store:
        assert store.get_status("s") == ("error", "the answer broke off", 1)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_child_has_no_producers(database):
    release = threading.Event()

    def source():
        yield "half"
        release.wait()

    with PostgresStreamStore(database) as store:
        stream = DurableStream.start(store, source())
        next(store.read_from(stream.id))
        with Producer._registry_mutex:  # held by another thread at the moment of the fork
            assert in_a_child(lambda: (len(Producer.running()), DurableStream.shutdown(store, 20))) == "(0, True)"
        assert [producer.stream_id for producer in Producer.running(store)] == [stream.id]
        release.set()
        assert stream.wait(20).state == "done"
