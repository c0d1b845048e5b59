-- audit_total.sql - how often: a campaign's total is not the number of its tasks and outcomes. $1 campaign name text, or null for all
--   \set audit `cat audit_total.sql`
--   prepare audit as :audit
--   execute audit(null);
select count(*)
from campaign c
left join (select campaign_id, count(*) as n from task group by 1) t on t.campaign_id = c.id
left join (select campaign_id, count(*) as n from outcome group by 1) o on o.campaign_id = c.id
where ($1::text is null or c.name = $1::text) and c.total <> coalesce(t.n, 0) + coalesce(o.n, 0);
