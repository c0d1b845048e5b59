-- audit_held.sql - how often: a running task has no worker or lease, or a ready one has. $1 campaign name text, or null for all
--   \set audit `cat audit_held.sql`
--   prepare audit as :audit
--   execute audit(null);
select count(*)
from task t join campaign c on c.id = t.campaign_id
where (t.state = 1) <> (t.worker is not null and t.lease_until is not null) and ($1::text is null or c.name = $1::text);
