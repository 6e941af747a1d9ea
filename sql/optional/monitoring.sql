-- Views for monitoring systems that query the database. They need all migrations. A view runs with the rights of its
-- owner: grant SELECT on the views alone to the role of the monitoring system.

-- One row. Active streams without a lease are those of other software, such as @aibind/postgres. `abandoned` streams
-- have an expired lease. `expired` streams wait for the cleanup, the oldest one for `cleanup_lag` seconds. Ages are in
-- seconds, or NULL without such a stream or turn. The marker row of the housekeeper is not counted. Ages use the clock
-- rounded as the stored times are, and read after the rows: no age is negative.

CREATE OR REPLACE VIEW aibind_stream_status_summary(
  active, without_lease, abandoned, oldest_active_age, failed_last_hour, expired, cleanup_lag, housekeeping_age,
  notification_queue_usage
) AS
SELECT a.active, a.without_lease, a.abandoned, a.oldest_active_age, f.failed_last_hour, e.expired, e.cleanup_lag,
       (SELECT ((extract(epoch FROM clock_timestamp()) * 1000)::bigint - expires_at) / 1000.0
          FROM aibind_stream_status WHERE id = 'aibind_postgres.housekeeping'),
       pg_notification_queue_usage()
  FROM (SELECT count(*) AS active,
               count(*) FILTER (WHERE lease_until IS NULL) AS without_lease,
               count(*) FILTER (WHERE lease_until <= extract(epoch FROM now()) * 1000) AS abandoned,
               extract(epoch FROM clock_timestamp() - min(created_at)) AS oldest_active_age
          FROM aibind_stream_status WHERE state = 'active') AS a,
       (SELECT count(*) AS failed_last_hour
          FROM aibind_stream_status
         WHERE state <> 'active' AND state <> 'deleted' AND archived_at IS NULL AND state = 'error'
           AND coalesce(created_at, '-infinity') > now() - interval '1 hour') AS f,
       (SELECT count(*) AS expired,
               ((extract(epoch FROM clock_timestamp()) * 1000)::bigint - min(expires_at)) / 1000.0 AS cleanup_lag
          FROM aibind_stream_status
         WHERE state <> 'active' AND id <> 'aibind_postgres.housekeeping'
           AND expires_at <= (extract(epoch FROM now()) * 1000)::bigint) AS e;

-- One row for each table: its rows as PostgreSQL estimates them, the share of dead ones, its size with indexes and texts
-- in bytes, and the time of its last vacuum. The partitions of a table are counted together.

CREATE OR REPLACE VIEW aibind_stream_status_tables(name, live_rows, dead_rows, dead_share, bytes, last_vacuum) AS
SELECT t.name, sum(s.n_live_tup)::bigint, sum(s.n_dead_tup)::bigint,
       round(sum(s.n_dead_tup) / greatest(sum(s.n_live_tup + s.n_dead_tup), 1), 3),
       sum(pg_total_relation_size(s.relid))::bigint, max(greatest(s.last_vacuum, s.last_autovacuum))
  FROM (VALUES ('status', to_regclass('aibind_stream_status')),
               ('chunks', to_regclass('aibind_stream_chunks')),
               ('archive', to_regclass('aibind_stream_chunks_archive')),
               ('conversations', to_regclass('aibind_conversations'))) AS t (name, root),
       pg_stat_all_tables AS s
 WHERE s.relid = t.root OR s.relid IN (SELECT relid FROM pg_partition_tree(t.root))
 GROUP BY t.name;
