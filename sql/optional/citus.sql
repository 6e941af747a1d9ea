-- Distributes the tables over the workers of a Citus cluster: streams by their id, conversations by their session_id.
-- Run it on the coordinator, in a database with the extension citus, after the migrations. It is safe to repeat, but
-- blocks the tables while it copies rows that they already have.

-- Appends to one stream on its worker, in a local transaction. The statements of an append would each be sent to the
-- worker by the coordinator. Returns the number of the last chunk, or NULL if the stream was skipped: it is not active,
-- or `expected` is not its next number. `texts` is a JSON array. `ttl` and `lease` are milliseconds; a stream without a
-- lease keeps none. The expiry is rounded up to a quarter of the ttl, so that most updates are heap-only.

CREATE OR REPLACE FUNCTION aibind_stream_status_append(
  stream_id TEXT, texts JSON, expected BIGINT, ttl BIGINT, lease BIGINT
) RETURNS INTEGER
LANGUAGE plpgsql AS $append$
DECLARE
  added INTEGER := json_array_length(texts);
  now BIGINT := extract(epoch FROM statement_timestamp()) * 1000;
  last INTEGER;
BEGIN
  UPDATE aibind_stream_status AS s
     SET total_chunks = total_chunks + added,
         expires_at = greatest(
           expires_at,
           ((now + coalesce(ttl_ms, ttl) - 1) / greatest(coalesce(ttl_ms, ttl) / 4, 1) + 1)
             * greatest(coalesce(ttl_ms, ttl) / 4, 1)
         ),
         lease_until = lease_until + greatest(now + lease - lease_until, 0)
   WHERE id = stream_id AND state = 'active' AND total_chunks >= 0
     AND (expected IS NULL OR total_chunks = expected - 1)
  RETURNING total_chunks INTO last;
  IF last IS NULL THEN
    RETURN NULL;
  END IF;
  IF added = 1 THEN
    INSERT INTO aibind_stream_chunks (id, seq, data) VALUES (stream_id, last, texts ->> 0);
  ELSE
    INSERT INTO aibind_stream_chunks (id, seq, data)
    SELECT stream_id, last - added + new.ordinal, new.data
      FROM json_array_elements_text(texts) WITH ORDINALITY AS new (data, ordinal);
  END IF;
  RETURN last;
END
$append$;

-- The archive refers to the status table, so it is distributed after that one, if it exists.

DO $distribute$
DECLARE
  status REGCLASS := to_regclass('aibind_stream_status');
  streams REGCLASS[] := ARRAY[
    status, to_regclass('aibind_stream_chunks'), to_regclass('aibind_stream_chunks_archive')
  ];
  conversations REGCLASS := to_regclass('aibind_conversations');
  member REGCLASS;
BEGIN
  IF to_regclass('pg_catalog.pg_dist_partition') IS NULL THEN
    RAISE EXCEPTION 'the extension citus is missing: create it in this database on each node, and add the workers'
      USING ERRCODE = 'feature_not_supported';
  END IF;
  SET LOCAL citus.multi_shard_modify_mode = 'sequential';
  FOREACH member IN ARRAY streams LOOP
    IF NOT EXISTS (SELECT FROM pg_dist_partition WHERE logicalrelid = member) AND member IS NOT NULL THEN
      PERFORM create_distributed_table(
        member, 'id', colocate_with => CASE WHEN member = status THEN 'default' ELSE status::text END
      );
    END IF;
  END LOOP;
  IF NOT EXISTS (SELECT FROM pg_dist_partition WHERE logicalrelid = conversations) THEN
    PERFORM create_distributed_table(conversations, 'session_id');
  END IF;
  PERFORM create_distributed_function(
    to_regproc('aibind_stream_status_append')::oid::regprocedure, 'stream_id', colocate_with => status::text
  );
END
$distribute$;
