-- For cleanup. Every save also writes this index, which is cheap compared with writing the conversation.

CREATE INDEX IF NOT EXISTS aibind_conversations_expires_at_idx ON aibind_conversations (expires_at);
