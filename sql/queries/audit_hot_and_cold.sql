-- audit_hot_and_cold.sql - how often: a task is both open and ended. $1 campaign name text, or null for all
--   \set audit `cat audit_hot_and_cold.sql`
--   prepare audit as :audit
--   execute audit(null);
select count(*)
from task t join outcome o on o.task_id = t.id join campaign c on c.id = t.campaign_id
where $1::text is null or c.name = $1::text;
