-- failures.sql - what failed, and why, in the order of the file. $1 campaign name text
--   \set failures `cat failures.sql`
--   prepare failures as :failures
--   execute failures('cats');
select o.task_id, c.name, o.row, o.variation, o.prompt, o.kind, o.reason, o.worker, o.attempt
from campaign c
join outcome o on o.campaign_id = c.id and o.state = 'failed'
where c.id = (select id from campaign where name = $1::text)
order by o.row, o.variation, o.task_id;
