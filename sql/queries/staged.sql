-- staged.sql - whose are the staged files found on disk? $1 task bigint[], $2 token bigint[]
--   \set staged `cat staged.sql`
--   prepare staged as :staged
--   execute staged(array[1], array[1]);
-- Answers position, 'c' committed (publish it as `file`), 'r' its task is still open (leave it), 's' stale (remove it).
-- A task that was never here is another farm's, or of a database before this one: 'r' as well, it is not ours to remove.
select a.n, case when i.task_id is not null then 'c' when t.lease_token = a.token then 'r'
                 when t.id is not null or o.task_id is not null then 's' else 'r' end as state, i.file
from unnest($1::bigint[], $2::bigint[]) with ordinality as a (task_id, token, n)
left join image i on i.task_id = a.task_id and i.lease_token = a.token
left join task t on t.id = a.task_id
left join outcome o on o.task_id = a.task_id;
