-- Briefly locks the tables. The order avoids deadlocks with running stores: they also lock the status table first, and
-- its strongest lock precedes the weaker ones.

-- The time of insertion of each row, for replay at the recorded pace and for listing by time. Existing rows keep NULL.
-- Separate statements for the column and its default avoid rewriting a large table. The default is clock_timestamp()
-- because one transaction may append many chunks.

ALTER TABLE aibind_stream_status ADD COLUMN IF NOT EXISTS created_at TIMESTAMPTZ;

ALTER TABLE aibind_stream_status ALTER COLUMN created_at SET DEFAULT clock_timestamp();

-- Every append updates the status row of its stream. Free space in the pages keeps these updates heap-only (HOT): they
-- do not touch indexes, and the next access to a page reclaims the old row versions.

ALTER TABLE aibind_stream_status SET (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.05);

-- For cleanup and fail_abandoned. Appends do not change the state, and change expires_at at most once per quarter of
-- the ttl, so nearly all of them stay heap-only.

CREATE INDEX IF NOT EXISTS aibind_stream_status_expires_at_idx ON aibind_stream_status (expires_at)
WHERE state <> 'active';

CREATE INDEX IF NOT EXISTS aibind_stream_status_active_idx ON aibind_stream_status (id)
WHERE state = 'active';

ALTER TABLE aibind_stream_chunks ADD COLUMN IF NOT EXISTS created_at TIMESTAMPTZ;

ALTER TABLE aibind_stream_chunks ALTER COLUMN created_at SET DEFAULT clock_timestamp();
