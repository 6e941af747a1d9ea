-- For cleanup. The index is one more to be written by every save, which is small beside the conversation itself.

CREATE INDEX IF NOT EXISTS aibind_conversations_expires_at_idx ON aibind_conversations (expires_at);
