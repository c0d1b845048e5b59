-- offer.sql - the groups with at least one task that may be claimed now, of active campaigns; highest priority first.
-- $1 at most int
--   \set offer `cat offer.sql`
--   prepare offer as :offer
--   execute offer(256);
-- The recursion steps from group to group through task_ready, so its cost is the number of groups that have ready
-- tasks, not the number of tasks or of groups ever made. When there are more groups than $1, every campaign
-- of the same priority gets its first ones before any gets its second. The last but one counts the group's claimable tasks, up to 64
-- (TASK_STORE_SEEN_MAX): when few are left, workers share them. The last is a number for the adapters: 0 without any.
with recursive step (group_id) as (
    (select t.group_id from task t where t.state = 0 order by t.group_id limit 1)
    union all
    select (select t.group_id from task t where t.state = 0 and t.group_id > s.group_id order by t.group_id limit 1)
    from step s where s.group_id is not null
), claimable as (
    select g.*, row_number() over (partition by g.campaign_id order by g.id) as turn
    from step s
    join task_group g on g.id = s.group_id
    join campaign c on c.id = g.campaign_id and c.state = 'active'
    where exists (select from task t where t.group_id = s.group_id and t.state = 0 and t.not_before <= now())
), listed as (
    select g.id, g.campaign_id, c.name, g.model, g.width, g.height, g.steps, g.guidance, g.loras, c.out_dir, c.format, c.use, c.priority,
           row_number() over (order by c.priority desc, g.turn, g.id) as place
    from claimable g join campaign c on c.id = g.campaign_id
    order by c.priority desc, g.turn, g.id
    limit $1::int
)
select l.id, l.campaign_id, l.name, l.model, l.width, l.height, l.steps, l.guidance, l.out_dir, l.format, l.use, l.priority,
       (select count(*) from (select from task t where t.group_id = l.id and t.state = 0 and t.not_before <= now() limit 64) seen)::int,
       case when l.loras = '' then 0 else hashtextextended(l.loras, 0) end
from listed l
order by l.place;
