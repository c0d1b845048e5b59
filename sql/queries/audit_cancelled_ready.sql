-- audit_cancelled_ready.sql - how often: a cancelled campaign has ready tasks. $1 campaign name text, or null for all
--   \set audit `cat audit_cancelled_ready.sql`
--   prepare audit as :audit
--   execute audit(null);
select count(*)
from task t join campaign c on c.id = t.campaign_id
where t.state = 0 and c.state = 'cancelled' and ($1::text is null or c.name = $1::text);
