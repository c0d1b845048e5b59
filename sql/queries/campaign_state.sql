-- campaign_state.sql - after campaign_lock.sql. $1 campaign bigint, $2 state text
--   \set state `cat campaign_state.sql`
--   prepare state as :state
--   execute state(1, 'paused');
update campaign set state = $2::text, touched_at = clock_timestamp() where id = $1::bigint;
