-- audit_groups.sql - how often: a task or outcome is in another campaign's group, or in none. $1 campaign name text, or null for all
--   \set audit `cat audit_groups.sql`
--   prepare audit as :audit
--   execute audit(null);
select count(*)
from (select campaign_id, group_id from task union all select campaign_id, group_id from outcome) t
left join task_group g on g.id = t.group_id and g.campaign_id = t.campaign_id
left join campaign c on c.id = t.campaign_id
where g.id is null and ($1::text is null or c.name = $1::text);
