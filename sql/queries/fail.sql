-- fail.sql - workers say what they will not finish. One element per task:
-- $1 task bigint[], $2 token bigint[], $3 kind text[] (refuse, retry, lost, released), $4 reason text[]
--   \set fail `cat fail.sql`
--   prepare fail as :fail
--   execute fail(array[1], array[1], array['retry'], array['out of memory']);
-- Answers the positions (from 1) that are accepted, now or before with the same token. The others are stale.
select * from give_back($1::bigint[], $2::bigint[], $3::text[], $4::text[]);
