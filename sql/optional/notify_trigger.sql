-- Sends a notification for writes by software that does not send its own, such as @aibind/postgres. Readers then wake at
-- once instead of at their next poll. NOTIFY inside the transaction of the writer holds a cluster-wide lock during the
-- commit: do not install the trigger if all writers use this package.

CREATE OR REPLACE FUNCTION aibind_stream_status_notify() RETURNS trigger
LANGUAGE plpgsql AS $notify$
DECLARE
  payload TEXT := json_build_object('ids', json_build_array(NEW.id))::text;
BEGIN
  -- A payload has at most 7,999 bytes. An empty payload wakes all readers.
  PERFORM pg_notify(TG_TABLE_NAME, CASE WHEN octet_length(payload) < 8000 THEN payload ELSE '' END);
  RETURN NULL;
END
$notify$;

CREATE OR REPLACE TRIGGER aibind_stream_status_notify_trigger
AFTER INSERT OR UPDATE ON aibind_stream_status
FOR EACH ROW EXECUTE FUNCTION aibind_stream_status_notify();
