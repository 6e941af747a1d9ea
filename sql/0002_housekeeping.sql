-- The status table comes first, as in every statement of the store, and its strongest lock before the weaker ones: any
-- other way this could deadlock with the store, when it is applied again while that is in use. It waits for statements
-- under way and holds others up for a moment.

-- When each row was written, for replay at the recorded pace and for listing by time. Rows from before this migration
-- keep NULL: nobody knows. The default comes in a statement of its own, so that a large table is not rewritten, and is
-- the time of the insertion, since many chunks may be appended in one transaction.

ALTER TABLE aibind_stream_status ADD COLUMN IF NOT EXISTS created_at TIMESTAMPTZ;

ALTER TABLE aibind_stream_status ALTER COLUMN created_at SET DEFAULT clock_timestamp();

-- Every append updates the stream's status row. Room in the page keeps those updates heap-only (HOT): they touch no
-- index, and the next reader of the page reclaims what they leave behind.

ALTER TABLE aibind_stream_status SET (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.05);

-- For cleanup, and for fail_abandoned. An append changes neither the state nor, but once in a quarter of the ttl,
-- expires_at: so these indexes leave nearly all appends heap-only.

CREATE INDEX IF NOT EXISTS aibind_stream_status_expires_at_idx ON aibind_stream_status (expires_at)
WHERE state <> 'active';

CREATE INDEX IF NOT EXISTS aibind_stream_status_active_idx ON aibind_stream_status (id)
WHERE state = 'active';

ALTER TABLE aibind_stream_chunks ADD COLUMN IF NOT EXISTS created_at TIMESTAMPTZ;

ALTER TABLE aibind_stream_chunks ALTER COLUMN created_at SET DEFAULT clock_timestamp();
