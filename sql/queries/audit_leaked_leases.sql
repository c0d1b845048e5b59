-- audit_leaked_leases.sql - how often: a lease ended more than a minute before the last sweep and was not given back. $1 campaign name text, or null for all
--   \set audit `cat audit_leaked_leases.sql`
--   prepare audit as :audit
--   execute audit(null);
select count(*)
from task t join campaign c on c.id = t.campaign_id join duty d on d.name = 'sweep'
where t.state = 1 and t.lease_until < d.until - interval '70 s' and ($1::text is null or c.name = $1::text);
