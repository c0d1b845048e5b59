-- audit_image_without_done.sql - how often: an image has no outcome that is done. $1 campaign name text, or null for all
--   \set audit `cat audit_image_without_done.sql`
--   prepare audit as :audit
--   execute audit(null);
select count(*)
from image i left join outcome o on o.task_id = i.task_id and o.state = 'done'
join campaign c on c.id = i.campaign_id
where o.task_id is null and ($1::text is null or c.name = $1::text);
