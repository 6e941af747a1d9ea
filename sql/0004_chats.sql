-- For chats: whose stream or conversation it is, which answer is running, and leases of producers. Adding the columns
-- rewrites no table. Writers that do not know the columns, such as the TypeScript package, leave them NULL.

-- lease_until and ttl_ms are milliseconds, by the server's clock as expires_at. Appends renew lease_until, which no
-- index may contain: otherwise they would not stay heap-only.

ALTER TABLE aibind_stream_status
  ADD COLUMN IF NOT EXISTS session_id TEXT,
  ADD COLUMN IF NOT EXISTS owner TEXT,
  ADD COLUMN IF NOT EXISTS metadata JSONB,
  ADD COLUMN IF NOT EXISTS ttl_ms BIGINT,
  ADD COLUMN IF NOT EXISTS lease_until BIGINT,
  ADD COLUMN IF NOT EXISTS wire TEXT;

-- For the running answer of a conversation, and for the streams of a conversation or of an owner.

CREATE INDEX IF NOT EXISTS aibind_stream_status_running_idx ON aibind_stream_status (session_id, created_at)
WHERE state = 'active' AND session_id IS NOT NULL;

CREATE INDEX IF NOT EXISTS aibind_stream_status_session_id_idx ON aibind_stream_status (session_id, id)
WHERE session_id IS NOT NULL;

CREATE INDEX IF NOT EXISTS aibind_stream_status_owner_idx ON aibind_stream_status (owner, id)
WHERE owner IS NOT NULL;

-- Existing conversations sort as the oldest. A later default avoids rewriting the table.

ALTER TABLE aibind_conversations
  ADD COLUMN IF NOT EXISTS owner TEXT,
  ADD COLUMN IF NOT EXISTS title TEXT,
  ADD COLUMN IF NOT EXISTS metadata JSONB,
  ADD COLUMN IF NOT EXISTS created_at TIMESTAMPTZ,
  ADD COLUMN IF NOT EXISTS updated_at TIMESTAMPTZ DEFAULT '-infinity';

ALTER TABLE aibind_conversations
  ALTER COLUMN created_at SET DEFAULT clock_timestamp(),
  ALTER COLUMN updated_at SET DEFAULT clock_timestamp();

-- For lists of conversations, newest first: of one owner, and of all.

CREATE INDEX IF NOT EXISTS aibind_conversations_owner_idx ON aibind_conversations (owner, updated_at, session_id)
WHERE owner IS NOT NULL;

CREATE INDEX IF NOT EXISTS aibind_conversations_updated_at_idx ON aibind_conversations (updated_at, session_id);
