-- Announces what is written by those who do not announce it themselves, such as @aibind/postgres: readers then wake at
-- once instead of at their next poll. It runs inside the writer's transaction, where notifying holds a lock that is
-- shared by the whole cluster during commit: leave it out where every writer is this package.

CREATE OR REPLACE FUNCTION aibind_stream_status_announce() RETURNS trigger
LANGUAGE plpgsql AS $announce$
DECLARE
  payload TEXT := json_build_object('ids', json_build_array(NEW.id))::text;
BEGIN
  -- A payload has at most 7,999 bytes. An empty one tells every reader to look.
  PERFORM pg_notify(TG_TABLE_NAME, CASE WHEN octet_length(payload) < 8000 THEN payload ELSE '' END);
  RETURN NULL;
END
$announce$;

CREATE OR REPLACE TRIGGER aibind_stream_status_announce_trigger
AFTER INSERT OR UPDATE ON aibind_stream_status
FOR EACH ROW EXECUTE FUNCTION aibind_stream_status_announce();
