-- submit_total.sql - counts in what is left of the chunk. $1 campaign bigint
--   \set total `cat submit_total.sql`
--   prepare total as :total
--   execute total(1);
update campaign set total = total + (select count(*) from submit_row), touched_at = clock_timestamp()
where id = $1::bigint;
