-- Sends a notification for writes by software that does not send its own, such as @aibind/postgres. Readers then wake at
-- once instead of at their next poll. NOTIFY inside the transaction of the writer holds a cluster-wide lock during the
-- commit: do not install the trigger if all writers use this package.

-- Notifications are visible to every role that may connect, so they contain a digest instead of the id. The channel is
-- an argument, because TG_TABLE_NAME is the name of the partition if the table is partitioned.

CREATE OR REPLACE FUNCTION aibind_stream_status_notify() RETURNS trigger
LANGUAGE plpgsql AS $notify$
BEGIN
  PERFORM pg_notify(TG_ARGV[0], '- ' || left(encode(sha256(convert_to(NEW.id, 'UTF8')), 'hex'), 32));
  RETURN NULL;
END
$notify$;

CREATE OR REPLACE TRIGGER aibind_stream_status_notify_trigger
AFTER INSERT OR UPDATE ON aibind_stream_status
FOR EACH ROW EXECUTE FUNCTION aibind_stream_status_notify('aibind_stream_status');
