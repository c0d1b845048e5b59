-- submit_tasks.sql - a chunk's new content keys become tasks; known ones change nothing. $1 campaign bigint
--   \set tasks `cat submit_tasks.sql`
--   prepare tasks as :tasks
--   execute tasks(1);
-- Answers rows added and rows in the chunk.
with fresh as (
    insert into content (campaign_id, content_key, task_id, file)
    select $1::bigint, content_key, id, file from submit_row order by id
    on conflict (campaign_id, content_key) do nothing
    returning task_id
), added as (
    insert into task (id, campaign_id, group_id, row, variation, truncate, seed, content_key, file, name, prompt, negative,
                      labels)
    select s.id, $1::bigint, g.id, s.row, s.variation, s.truncate, s.seed, s.content_key, s.file, s.name, s.prompt,
           s.negative, s.labels
    from submit_row s
    join task_group g on g.campaign_id = $1::bigint and g.model = s.model and g.width = s.width and g.height = s.height
        and g.steps = s.steps and g.guidance = s.guidance
    where s.id in (select task_id from fresh)
    order by s.id
    returning 1
)
select (select count(*) from added), (select count(*) from submit_row), (select count(*) from fresh);
