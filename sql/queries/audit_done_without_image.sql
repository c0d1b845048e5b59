-- audit_done_without_image.sql - how often: an outcome is done but has not exactly its image. $1 campaign name text, or null for all
--   \set audit `cat audit_done_without_image.sql`
--   prepare audit as :audit
--   execute audit(null);
select count(*)
from outcome o left join image i on i.task_id = o.task_id and i.lease_token = o.lease_token and i.campaign_id = o.campaign_id
join campaign c on c.id = o.campaign_id
where o.state = 'done' and i.task_id is null and ($1::text is null or c.name = $1::text);
