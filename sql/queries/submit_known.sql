-- submit_known.sql - takes the rows whose content key was there before out of the chunk. $1 campaign bigint
--   \set known `cat submit_known.sql`
--   prepare known as :known
--   execute known(1);
delete from submit_row s
where s.id not in (select k.task_id from submit_row r join lateral (
                       select c.task_id from content c
                       where c.campaign_id = $1::bigint and c.content_key = r.content_key offset 0) k on true);
