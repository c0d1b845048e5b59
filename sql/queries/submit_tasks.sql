-- submit_tasks.sql - what is left of the chunk becomes tasks. $1 campaign bigint
--   \set tasks `cat submit_tasks.sql`
--   prepare tasks as :tasks
--   execute tasks(1);
-- Answers rows added.
with added as (
    insert into task (id, campaign_id, group_id, row, variation, truncate, seed, content_key, file, name, prompt, negative,
                      labels, inputs)
    select s.id, $1::bigint, g.id, s.row, s.variation, s.truncate, s.seed, s.content_key, s.file, s.name, s.prompt,
           s.negative, s.labels, s.inputs
    from submit_row s
    join task_group g on g.campaign_id = $1::bigint and g.model = s.model and g.width = s.width and g.height = s.height
        and g.steps = s.steps and g.guidance = s.guidance and g.layout = s.layout and g.loras = s.loras
    returning 1
)
select count(*) from added;
