-- finish.sql - images become official: the task leaves, its outcome and its image come, all or nothing.
-- All parameters are arrays with one element per image: $1 task bigint[], $2 token bigint[], $3 worker text[],
-- $4 sha256 bytea[], $5 digest text[], $6 bytes bigint[], $7 seed numeric[], $8 width int[], $9 height int[],
-- $10 steps int[], $11 guidance float8[], $12 render_s float8[], $13 truncated bool[]
--   \set finish `cat finish.sql`
--   prepare finish as :finish
--   execute finish(array[1], array[1], array['gpu-1'], array[sha256('pixels')], array['d1'], array[900], array[7],
--                  array[512], array[512], array[4], array[1.0], array[0.8], array[false]);
-- Answers the positions (from 1) that are committed: now, or before with the same token. The others are stale.
-- A task whose lease ended but that nobody claimed since still has its token: its image is welcome.
with asked as (
    select * from unnest($1::bigint[], $2::bigint[], $3::text[], $4::bytea[], $5::text[], $6::bigint[], $7::numeric[],
                         $8::int[], $9::int[], $10::int[], $11::float8[], $12::float8[], $13::bool[])
        with ordinality as a (task_id, token, by_worker, sha256, digest, bytes, used_seed, width, height, steps, guidance,
                              render_s, truncated, n)
), ended as (
    delete from task t using asked a
    where t.id = a.task_id and t.lease_token = a.token and a.token > 0
    returning t.*, a.token, a.by_worker, a.sha256, a.digest, a.bytes, a.used_seed, a.width, a.height, a.steps,
              a.guidance, a.render_s, a.truncated
), kept as (
    insert into outcome (task_id, campaign_id, group_id, lease_token, attempt, lost, row, variation, truncate, state, seed,
                         content_key, worker, file, name, prompt, negative, labels, inputs)
    select id, campaign_id, group_id, lease_token, attempt, lost, row, variation, truncate, 'done', seed, content_key,
           by_worker, file, name, prompt, negative, labels, inputs
    from ended
), shown as (
    insert into image (task_id, campaign_id, lease_token, bytes, width, height, steps, attempt, guidance, render_s,
                       truncated, seed, sha256, worker, digest, file)
    select id, campaign_id, lease_token, bytes, width, height, steps, greatest(attempt, 1), guidance, render_s, truncated,
           used_seed, sha256, by_worker, digest, file
    from ended
), counted as (
    insert into campaign_count (campaign_id, done) select campaign_id, count(*) from ended group by campaign_id
), credited as (
    update worker w set done = w.done + e.done
    from (select by_worker, count(*) as done from ended group by by_worker) e
    where w.name = e.by_worker
)
select a.n
from asked a
where (a.task_id, a.token) in (select id, token from ended)
   or exists (select from image i where i.task_id = a.task_id and i.lease_token = a.token);
