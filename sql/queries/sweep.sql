-- sweep.sql - what time has changed: tasks whose lease ended are given back as lost.
-- $1 coordinator text, $2 at most int
--   \set sweep `cat sweep.sql`
--   prepare sweep as :sweep
--   execute sweep('coordinator-1', 1024);
-- One coordinator at a time sweeps: the holder of the duty, until it has been silent for 10 s. The database's clock
-- decides. Answers the positions given back.
with mine as (
    insert into duty as d (name, holder, term, until)
    values ('sweep', $1::text, 1, clock_timestamp() + interval '10 s')
    on conflict (name) do update
    set holder = excluded.holder, until = excluded.until, term = d.term + (d.holder <> excluded.holder)::int
    where d.holder = excluded.holder or d.until < clock_timestamp()
    returning term
), expired as (
    select t.id, t.lease_token,
           format('the lease ended: nothing was heard of worker %s, which had the task', t.worker) as reason
    from task t
    where t.state = 1 and t.lease_until < clock_timestamp() and exists (select from mine)
    limit $2::int
    for update skip locked
), listed as (
    select array_agg(id) as tasks, array_agg(lease_token) as tokens, array_agg('lost'::text) as kinds,
           array_agg(reason) as reasons
    from expired
)
select g from listed, give_back(tasks, tokens, kinds, reasons) as g where tasks is not null;
