-- staged.sql - whose are the staged files found on disk? $1 task bigint[], $2 token bigint[]
--   \set staged `cat staged.sql`
--   prepare staged as :staged
--   execute staged(array[1], array[1]);
-- Answers position, 'c' committed (publish it as `file`), 'r' its task is still open (leave it), 's' stale (remove it).
select a.n, case when i.task_id is not null then 'c' when t.id is not null then 'r' else 's' end as state, i.file
from unnest($1::bigint[], $2::bigint[]) with ordinality as a (task_id, token, n)
left join image i on i.task_id = a.task_id and i.lease_token = a.token
left join task t on t.id = a.task_id and t.lease_token = a.token;
