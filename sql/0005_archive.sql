-- For archiving finished streams: their chunks move from rows of their own to pages of about a thousand texts, which
-- PostgreSQL compresses. Software that does not know the pages, such as the TypeScript package, finds no chunks in an
-- archived stream.

-- When the last chunk has moved. NULL for a stream that may be archived later, '-infinity' for one that `unarchive` has
-- brought back. Appends do not change the column.

ALTER TABLE aibind_stream_status ADD COLUMN IF NOT EXISTS archived_at TIMESTAMPTZ;

-- For the search of streams to archive, the oldest first. Streams from before migration 0002 have no time.

CREATE INDEX IF NOT EXISTS aibind_stream_status_archivable_idx
ON aibind_stream_status (coalesce(created_at, '-infinity'))
WHERE state <> 'active' AND state <> 'deleted' AND archived_at IS NULL;

-- A page has consecutive chunks. `texts` is a JSON array. So is `times`: the first time in microseconds since the epoch,
-- then the differences to the time before. An unknown time is null, and the time after it is absolute again. `times` is
-- NULL if no time of the page is known. The foreign key deletes the pages with their stream, whichever software deletes
-- it, so that a new stream with the same id never has pages.

CREATE TABLE IF NOT EXISTS aibind_stream_chunks_archive (
  id        TEXT   NOT NULL REFERENCES aibind_stream_status (id) ON DELETE CASCADE,
  first_seq BIGINT NOT NULL,
  last_seq  BIGINT NOT NULL,
  texts     TEXT   NOT NULL,
  times     TEXT,
  PRIMARY KEY (id, first_seq)
);
