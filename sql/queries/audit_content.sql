-- audit_content.sql - how often: a content key has no task and no outcome, or the other way round. $1 campaign name text, or null for all
--   \set audit `cat audit_content.sql`
--   prepare audit as :audit
--   execute audit(null);
select count(*)
from (select campaign_id, content_key, task_id as id from content) k
full join (select campaign_id, content_key, id from task union all
           select campaign_id, content_key, task_id from outcome) t using (campaign_id, content_key, id)
join campaign c on c.id = campaign_id
where ($1::text is null or c.name = $1::text) and (k is null or t is null);
