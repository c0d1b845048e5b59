-- extend.sql - the leases of tasks that workers still hold start anew.
-- $1 task bigint[], $2 token bigint[], $3 lease in ms int
--   \set extend `cat extend.sql`
--   prepare extend as :extend
--   execute extend(array[1], array[1], 60000);
-- state + 0: see claim.sql; `is true` keeps the list a hash, where a join could become a loop in a loop.
-- Answers the positions (from 1) that are alive: still ours, and of a campaign that is not cancelled.
with asked as (
    select * from unnest($1::bigint[], $2::bigint[]) with ordinality as a (task_id, token, n)
), alive as (
    update task t set lease_until = clock_timestamp() + $3::int * interval '1 ms'
    from asked a
    where t.id = a.task_id and t.lease_token = a.token and t.state + 0 = 1
      and (select c.state from campaign c where c.id = t.campaign_id) <> 'cancelled'
    returning t.id, t.lease_token
)
select a.n from asked a where ((a.task_id, a.token) in (select id, lease_token from alive)) is true;
