-- submit_groups.sql - the groups a chunk needs and the campaign does not have yet. $1 campaign bigint
--   \set groups `cat submit_groups.sql`
--   prepare groups as :groups
--   execute groups(1);
insert into task_group (campaign_id, model, width, height, steps, guidance, layout, loras)
select $1::bigint, * from (select distinct model, width, height, steps, guidance, layout, loras from submit_row) s
where not exists (
    select from task_group g
    where g.campaign_id = $1::bigint and (g.model, g.width, g.height, g.steps, g.guidance, g.layout, g.loras)
        = (s.model, s.width, s.height, s.steps, s.guidance, s.layout, s.loras))
order by model, width, height, steps, guidance, layout, loras
on conflict do nothing;
