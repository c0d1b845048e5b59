-- submit_total.sql - counts a chunk in; no row when the campaign was cancelled meanwhile: the chunk is rolled back.
-- $1 campaign bigint, $2 added bigint
--   \set total `cat submit_total.sql`
--   prepare total as :total
--   execute total(1, 100);
update campaign set total = total + $2::bigint, touched_at = clock_timestamp()
where id = $1::bigint and state <> 'cancelled'
returning total;
