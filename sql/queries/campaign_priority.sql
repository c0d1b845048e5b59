-- campaign_priority.sql - the last submit says how urgent a campaign is. $1 campaign bigint, $2 priority int
--   \set priority `cat campaign_priority.sql`
--   prepare priority as :priority
--   execute priority(1, 10);
update campaign set priority = $2::int where id = $1::bigint and priority <> $2::int;
