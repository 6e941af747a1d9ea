"""The archive of finished streams: its statements, as templates for `_sql`, and the pages that they read. Pure.

The chunks of an archived stream are in pages: rows with many texts each. Chunks of more than MAX_CHUNK_BYTES stay in
the chunks table. Each statement moves chunks or reads both tables, so every snapshot has every chunk exactly once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain
from operator import itemgetter
from typing import Any, NamedTuple, overload

from ._pages import LIMIT_DIVISOR, PAGE_BYTES, Page, fitting_limit
from ._stream_list import IN_RANGE

PAGE_CHUNKS, MAX_PAGE_TEXT = 1000, 100_000  # of one page at most; bytes, not counting its last chunk
MAX_CHUNK_BYTES = 1_000_000  # in JSON; PostgreSQL compresses a larger chunk as well by itself
JSON_FACTOR = 6  # JSON needs up to six bytes for one, such as \u0001
BATCH_CHUNKS = 10_000  # moved by one statement, by default
MOVED_BYTES = 8_000_000  # the largest size of the chunks that one statement moves; at least one chunk
BATCH_STREAMS = 100  # locked by one statement at most
RESTORED_PAGES = 10  # moved back by one statement
READER_CHUNKS = 10_000  # read by one statement at most; they are expanded page by page

MICROSECONDS = 1_000_000  # in a second; an int, since float times may be rounded twice

# Moves chunks of the streams without a chunk in the last $1 milliseconds: at most $2 chunks, the oldest streams first,
# each from its start. `counted` needs no sort of its input, so its LIMIT ends the scan of `locked`, and no more streams
# are locked than are needed. The chunks of a stream are a range of numbers after its last page, since a LIMIT may be
# planned as a sort of all its chunks. The range has one more than are moved, which the window reads ahead. It begins
# with the first chunk to move, which is almost always the first one at all: that one is found by the index, also in
# tables with partitions, where `min` may be planned as a scan of all. A stream without a chunk to move has one row.
ARCHIVE = """
WITH locked AS MATERIALIZED (
    SELECT id, total_chunks
      FROM {status} AS s
     WHERE state <> 'active' AND state <> 'deleted' AND archived_at IS NULL
       AND coalesce(created_at, '-infinity') <= {moment}
       AND coalesce(
               (SELECT created_at FROM {chunks} WHERE id = s.id AND seq <= s.total_chunks ORDER BY seq DESC LIMIT 1),
               '-infinity') <= {moment}
     ORDER BY coalesce(created_at, '-infinity')
     LIMIT {batch_streams}
       FOR UPDATE SKIP LOCKED
), counted AS MATERIALIZED (
    SELECT row_number() OVER () AS number, id, total_chunks, seq,
           sum(size) OVER (ROWS UNBOUNDED PRECEDING) AS sum
      FROM locked, LATERAL (
               SELECT coalesce(
                   (SELECT last_seq FROM {archive} WHERE id = locked.id ORDER BY first_seq DESC LIMIT 1), 0)
           ) AS p (moved), LATERAL (
               SELECT CASE WHEN is_moved THEN seq ELSE (
                          SELECT min(seq) FROM {chunks}
                           WHERE id = locked.id AND seq > p.moved AND seq <= total_chunks AND {is_moved}
                      ) END AS first
                 FROM (SELECT) AS one LEFT JOIN (
                          SELECT seq, seq <= total_chunks AND ({is_moved}) AS is_moved FROM {chunks}
                           WHERE id = locked.id AND seq > p.moved
                           ORDER BY seq
                           LIMIT 1
                      ) AS c ON true
           ) AS next LEFT JOIN LATERAL (
               SELECT seq, octet_length(data) AS size FROM {chunks}
                WHERE id = locked.id AND seq >= next.first AND seq <= next.first + $2::bigint AND seq <= total_chunks
                  AND {is_moved}
                ORDER BY seq
           ) AS c ON true
     LIMIT $2::bigint
), taken AS MATERIALIZED (
    SELECT min(number) AS number, id, total_chunks, min(seq) AS first, max(seq) AS last
      FROM counted
     WHERE number = 1 OR sum IS NULL OR sum <= {moved_bytes}
     GROUP BY id, total_chunks
), moved AS (
    DELETE FROM {chunks} AS c
     USING (SELECT number, id, first, last FROM taken WHERE last IS NOT NULL {few}) AS t
     WHERE c.id = t.id AND c.seq >= t.first AND c.seq <= t.last AND {is_moved}
    RETURNING t.number, c.id, c.seq, c.data, c.created_at
), numbered AS (
    SELECT number, id, seq, data, CASE WHEN created_at {in_range} THEN epoch END::bigint AS time,
           seq - row_number() OVER earlier AS gaps, (seq - 1) / {page_chunks} AS block,
           (sum(octet_length(data)) OVER earlier - octet_length(data)) / {max_page_text} AS size_block
      FROM moved, LATERAL (SELECT extract(epoch FROM created_at) * 1000000) AS t (epoch)
    WINDOW earlier AS (PARTITION BY number ORDER BY seq ROWS UNBOUNDED PRECEDING)
), differences AS (
    SELECT *, time - coalesce(lag(time) OVER (PARTITION BY number, gaps, block, size_block ORDER BY seq), 0) AS since
      FROM numbered
), stored AS (
    INSERT INTO {archive} (id, first_seq, last_seq, texts, times)
    SELECT id, first_seq, last_seq, texts, (SELECT times WHERE known_times > 0)
      FROM (
               SELECT min(id) AS id, min(seq) AS first_seq, max(seq) AS last_seq, json_agg(data ORDER BY seq) AS texts,
                      json_agg(since ORDER BY seq) AS times, count(time) AS known_times
                 FROM differences
                GROUP BY number, gaps, block, size_block
           ) AS page
), finished AS (
    UPDATE {status} AS s SET archived_at = statement_timestamp()
      FROM (
               SELECT id FROM taken
                WHERE (SELECT seq FROM {chunks}
                        WHERE id = taken.id AND seq > taken.last AND seq <= taken.total_chunks AND {is_moved}
                        LIMIT 1) IS NULL
               {few}
           ) AS f
     WHERE s.id = f.id
    RETURNING 1
)
SELECT (SELECT count(*) FROM finished) AS streams, (SELECT count(*) FROM moved) AS chunks,
       EXISTS (SELECT FROM taken) AS had_streams {commit_setting}
"""

# Moves the last pages of stream $1 back, and keeps the stream out of the archive. Other software may have stored some
# of the chunks again.
UNARCHIVE = """
WITH locked AS MATERIALIZED (
    SELECT id FROM {status} WHERE id = $1::text AND state <> 'deleted' FOR UPDATE
), last_pages AS MATERIALIZED (
    SELECT first_seq, octet_length(texts) AS size, {size_of_later} AS sum
      FROM {archive}
     WHERE id = $1::text AND EXISTS (SELECT FROM locked)
     ORDER BY first_seq DESC
     LIMIT {restored_pages}
), removed AS (
    DELETE FROM {archive}
     WHERE id = $1::text
       AND first_seq >= (SELECT min(first_seq) FROM last_pages WHERE sum <= {moved_bytes} OR sum = size)
    RETURNING first_seq, texts, times
), numbered AS (
    SELECT first_seq, position, data, since, count(*) FILTER (WHERE since IS NULL) OVER earlier AS unknown_times
      FROM removed, ROWS FROM (
               json_array_elements_text(texts::json), json_array_elements_text(times::json)
           ) WITH ORDINALITY AS item (data, since, position)
    WINDOW earlier AS (PARTITION BY first_seq ORDER BY position ROWS UNBOUNDED PRECEDING)
), timed AS (
    SELECT first_seq + position - 1 AS seq, data,
           sum(since::bigint) OVER (
               PARTITION BY first_seq, unknown_times ORDER BY position ROWS UNBOUNDED PRECEDING
           )::bigint AS time
      FROM numbered
), restored AS (
    INSERT INTO {chunks} (id, seq, data, created_at)
    SELECT $1::text, seq, data,
           timestamptz 'epoch' + time / 1000000 * interval '1 second' + time % 1000000 * interval '1 microsecond'
      FROM timed
        ON CONFLICT DO NOTHING
    RETURNING 1
), kept_out AS (
    UPDATE {status} SET archived_at = '-infinity'
     WHERE id = $1::text AND EXISTS (SELECT FROM locked) AND archived_at IS DISTINCT FROM '-infinity'
)
SELECT EXISTS (SELECT FROM locked) AS found, (SELECT count(*) FROM restored) AS chunks,
       EXISTS (SELECT FROM last_pages) AS had_pages {commit_setting}
"""

# Reads the status, the pages and the remaining chunks of a range of numbers. The first page has its texts, and so have
# those that end in the range, up to the size of a page of a reader. What is read then ends with a page, so that
# sequential reads get each page once.
READ_ARCHIVED = """
SELECT {status_row}, NULL::bigint AS last_seq{no_times} FROM {status} WHERE id = $1::text
UNION ALL
SELECT first_seq, CASE WHEN {is_read} THEN texts END, last_seq{times_of_page}
  FROM {archive}
 WHERE id = $1::text AND last_seq > $2::bigint AND first_seq >= {first_page}
   AND first_seq <= least({last_of_range}, (SELECT total_chunks FROM {status} WHERE id = $1::text))
UNION ALL
SELECT seq, CASE WHEN {fits_in_page} THEN data END, NULL{time_of_chunk}
  FROM {chunks}{epoch_of_chunk}
 WHERE id = $1::text AND seq > $2::bigint
   AND seq <= least({last_of_range}, (SELECT total_chunks FROM {status} WHERE id = $1::text))
"""
_POSITION = "least($2::bigint, 1::bigint << 62)"  # avoids an overflow; no chunk has a higher number
_LAST_OF_RANGE = f"{_POSITION} + $3::bigint"
_SIZE_SO_FAR = "sum(octet_length(texts)) OVER (ORDER BY first_seq ROWS UNBOUNDED PRECEDING)"
_IS_READ = f"""{_SIZE_SO_FAR} = octet_length(texts)
              OR ({_SIZE_SO_FAR} <= {PAGE_BYTES} AND last_seq <= {_LAST_OF_RANGE})"""

# The columns of READ_ARCHIVED for the times: the differences of a page, and the seconds since the epoch of a chunk.
TIMES = {
    "no_times": ", NULL::text AS times, NULL::float8 AS written_at",
    "times_of_page": f", CASE WHEN {_IS_READ} THEN times END, NULL",
    "time_of_chunk": f", NULL, CASE WHEN created_at {IN_RANGE} THEN epoch END",
    "epoch_of_chunk": ", LATERAL (SELECT extract(epoch FROM created_at)::float8) AS t (epoch)",
}
NO_TIMES = dict.fromkeys(TIMES, "")

_VALUES = {
    "moment": "statement_timestamp() - $1::bigint * interval '1 millisecond'",
    "page_chunks": str(PAGE_CHUNKS),
    "max_page_text": str(MAX_PAGE_TEXT),
    "is_moved": f"""(octet_length(data) <= {MAX_CHUNK_BYTES // JSON_FACTOR}
            OR octet_length(data) <= {MAX_CHUNK_BYTES}
               AND octet_length(to_json(data)::text) <= {MAX_CHUNK_BYTES + 2})""",
    "moved_bytes": str(MOVED_BYTES),
    "batch_streams": str(BATCH_STREAMS),
    "restored_pages": str(RESTORED_PAGES),
    "size_of_later": "sum(octet_length(texts)) OVER (ORDER BY first_seq DESC ROWS UNBOUNDED PRECEDING)",
    "last_of_range": _LAST_OF_RANGE,
    "is_read": _IS_READ,
    # The first number of the page that contains chunk $2 + 1, or of the last page before it.
    "first_page": f"""coalesce(
           (SELECT max(first_seq) FROM {{archive}} WHERE id = $1::text AND first_seq <= {_POSITION} + 1), 0)""",
}

# The parts of other statements that include the pages.
_PARTS = {
    # Of SKIPPED: how many of the texts in the JSON array $3 are in pages, from number $2 on.
    "plus_archived_texts": f"""
       + (SELECT count(*)
            FROM json_array_elements_text($3::text::json) WITH ORDINALITY AS sent (data, ordinal), {{archive}} AS page,
                 json_array_elements_text(texts::json) WITH ORDINALITY AS stored (data, ordinal)
           WHERE id = $1::text AND last_seq >= $2::bigint
             AND first_seq < {_POSITION} + json_array_length($3::text::json)
             AND first_seq >= coalesce(
                 (SELECT max(first_seq) FROM {{archive}} WHERE id = $1::text AND first_seq <= $2::bigint), 0)
             AND first_seq + stored.ordinal - $2::bigint = sent.ordinal AND stored.data COLLATE "C" = sent.data)""",
    # Of NEXT: the first number of the next page.
    "next_page": "(SELECT min(first_seq) FROM {archive} WHERE id = $1::text AND first_seq > $2::bigint)",
    # Of DELETE: the number of chunks in the pages of stream $1, which the foreign key deletes.
    "plus_archived": """
             + (SELECT coalesce(sum(last_seq - first_seq + 1), 0) FROM {archive} WHERE id = $1::text)""",
    # Of CLEANUP: the number of pages of an expired stream, and of the chunks in the pages of all chosen streams.
    "plus_pages": " + (SELECT count(*) FROM {archive} WHERE id = expired.id)",
    "plus_archived_of_chosen": """
       + (SELECT coalesce(sum(last_seq - first_seq + 1), 0)::bigint
            FROM (SELECT unnest(ARRAY(SELECT id FROM chosen)) {few}) AS archived (id),
                 LATERAL (SELECT first_seq, last_seq FROM {archive} WHERE id = archived.id) AS page)""",
}


def archive_values(archive: str | None, few: str) -> dict[str, str]:
    """Return the values for the templates of statements, with the pages or without.

    Args:
        archive: The archive table as SQL text, or None without migration 0005.
        few: The clause that lets the planner expect few rows.
    """
    if archive is None:
        return dict.fromkeys(_PARTS, "") | {"next_page": "NULL::bigint"}
    values = {name: part.format(archive=archive, few=few) for name, part in {**_VALUES, **_PARTS}.items()}
    return {"archive": archive, **values}


class _Part(NamedTuple):
    """Consecutive chunks of a page of the archive, or one chunk of the chunks table.

    Attributes:
        numbers: The sequence numbers.
        first: The first sequence number of the page. None for a chunk of the chunks table.
        text: The JSON array of the page, or the text of the chunk.
        times: With times: the JSON array of the page or None, and the time of the chunk or None.
    """

    numbers: range
    first: int | None
    text: str
    times: Sequence[Any]

    def rows(self) -> Iterable[tuple[Any, ...]]:
        if self.first is None:
            return [(self.numbers.start, self.text, *self.times[1:])]
        chosen = slice(self.numbers.start - self.first, self.numbers.stop - self.first)
        texts = json.loads(self.text)
        if not self.times:
            return zip(self.numbers, texts[chosen], strict=True)
        return zip(self.numbers, texts[chosen], seconds_of(self.times[0], len(texts))[chosen], strict=True)


class ArchivedRows(Sequence[tuple[Any, ...]]):
    """The rows of a page of a reader. Iterating expands one page of the archive at a time, so that memory is small."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return sum(len(part.numbers) for part in self._parts)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return chain.from_iterable(part.rows() for part in self._parts)

    @overload
    def __getitem__(self, index: int) -> tuple[Any, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[tuple[Any, ...]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return list(self)[index]


def parse_archived(rows: Sequence[tuple[Any, ...]], after: int, limit: int) -> Page | None:
    """Parse the rows of a statement that reads pages and chunks, or return None if the stream does not exist.

    The columns are the sequence number, the text, and the last sequence number of a page or NULL; with times also the
    times of a page, and the time of a chunk. The texts of a page are NULL if the page is too large or ends after the
    range; the text of a chunk is NULL if it is too large. The page of the reader then ends before it. Chunks that are
    in two rows, since other software has stored them again, are taken from the first one.

    Args:
        rows: The rows, in any order.
        after: The sequence number after which the statement reads.
        limit: The number of sequence numbers that the statement reads.
    """
    status, *found = sorted(rows, key=itemgetter(0)) or [()]
    page = Page.parse([status[:2]] if status else [], after, limit)
    if page is None:
        return None
    parts: list[_Part] = []
    characters = chunks = 0
    end, next_limit = after + limit, None
    read = after  # the last number of the parts
    for seq, text, last, *times in found:
        numbers = range(max(seq, read + 1), min(last or seq, after + limit, page.total) + 1)
        if not numbers:
            continue
        if text is None and last is None:
            end, next_limit = read, max(1, limit // LIMIT_DIVISOR)
            break
        if text is None:
            end = numbers.start - 1
            break
        parts.append(_Part(numbers, None if last is None else seq, text, times))
        read = numbers[-1]
        characters += len(text)
        chunks += (last or seq) - seq + 1
    return page._replace(
        rows=ArchivedRows(parts),
        end=end,
        next_limit=next_limit or fitting_limit(characters, chunks, READER_CHUNKS),
        last_seq=read if parts else None,  # without expanding the last part again
        is_archived=any(part.first is not None for part in parts),
    )


def seconds_of(times: str | None, count: int) -> list[float | None]:
    """Return the times of the chunks of a page, in seconds since the epoch; None for an unknown time.

    Args:
        times: The JSON array of a page, or None if no time of the page is known.
        count: The number of chunks of the page.
    """
    return [None if time is None else time / MICROSECONDS for time in microseconds_of(times, count)]


def microseconds_of(times: str | None, count: int) -> list[int | None]:
    """Return the times of `seconds_of` in microseconds."""
    if times is None:
        return [None] * count
    differences = json.loads(times)
    if None not in differences:
        return list(accumulate(differences))
    found: list[int | None] = []
    time: int | None = None
    for difference in differences:
        time = None if difference is None else (time or 0) + difference
        found.append(time)
    return found
