-- claim.sql - up to cardinality($2) ready tasks of one group become running; slot n of $2 says who gets the n-th.
-- $1 group bigint, $2 workers text[] (one per slot), $3 lease in ms int, $4 floor bigint: ids below it are not looked at
--   \set claim `cat claim.sql`
--   prepare claim as :claim
--   execute claim(1, array['gpu-1', 'gpu-1'], 60000, 0);
-- The state is a literal (a parameter would miss the partial index) and is checked again by the UPDATE: between
-- choosing a row and locking it somebody else may have claimed it. There it is written state + 0, which keeps the planner
-- from walking the whole partial index instead of looking up the few ids (it would, while the table has no statistics). The floor steps over rows that are gone but that a
-- long transaction elsewhere keeps vacuum from clearing; the caller lowers it to 0 now and then.
with picked as (
    select t.id
    from task t
    where t.group_id = $1::bigint and t.state = 0
      and t.not_before <= now() and (t.not_before, t.id) >= ('-infinity'::timestamptz, $4::bigint)
      and (select c.state = 'active' from task_group g join campaign c on c.id = g.campaign_id where g.id = $1::bigint)
    order by t.group_id, t.not_before, t.id
    limit cardinality($2::text[])
    for update skip locked
), numbered as (
    select id, row_number() over () as slot from picked
)
update task t
set state = 1, lease_token = t.lease_token + 1, attempt = t.attempt + 1, worker = ($2::text[])[n.slot],
    lease_until = clock_timestamp() + $3::int * interval '1 ms'
from numbered n
where t.id = n.id and t.state + 0 = 0
returning n.slot, t.id, t.lease_token, t.attempt, t.seed, t.truncate, t.file, t.prompt, t.negative,
          t.not_before = '-infinity' as fresh, t.inputs;
