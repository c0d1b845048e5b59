-- images.sql - the images of a campaign in the order of its file. $1 campaign name text
--   \set images `cat images.sql`
--   prepare images as :images
--   execute images('cats');
select o.task_id, c.name, o.row, o.variation,
       case when c.out_dir like '%/' then c.out_dir else c.out_dir || '/' end || i.file,
       encode(i.sha256, 'hex'), i.bytes, i.width, i.height, i.steps, i.guidance, i.seed, o.prompt, o.negative, g.model,
       i.digest, i.worker, i.attempt, i.render_s, i.truncated, o.labels, o.inputs
from campaign c
join outcome o on o.campaign_id = c.id and o.state = 'done'
join image i on i.task_id = o.task_id
join task_group g on g.id = o.group_id
where c.id = (select id from campaign where name = $1::text)
order by o.row, o.variation, o.task_id;
