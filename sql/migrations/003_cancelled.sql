-- 003_cancelled.sql - how many of the failed were cancelled: nothing went wrong with them, and lists say so.
--
-- As done and failed, cancelled is the campaign's own plus the sum of campaign_count; what was cancelled is counted in failed, too.
begin;

set local search_path = kiln;

alter table campaign add column cancelled bigint not null default 0;
alter table campaign_count add column cancelled bigint not null default 0;
update campaign c
set cancelled = (select count(*) from outcome o where o.campaign_id = c.id and o.state = 'failed' and o.kind = 'cancelled')
where c.state = 'cancelled'; -- in others nothing is: retry takes all failures back

-- give_back as in 002_inputs.sql, and it counts what is cancelled.
create or replace function give_back(tasks bigint[], tokens bigint[], kinds text[], reasons text[])
returns setof bigint language sql volatile set search_path = kiln as $$
    with listed as (
        select * from unnest(tasks, tokens, kinds, reasons) with ordinality as l (task_id, token, kind, reason, n)
    ), asked as (
        select distinct on (task_id, token) * from listed order by task_id, token, n
    ), held as (
        select t.id, t.attempt, t.lost, c.state as campaign_state, a.token, a.kind, a.reason
        from asked a
        join task t on t.id = a.task_id and t.lease_token = a.token and t.state + 0 = 1
        join campaign c on c.id = t.campaign_id
        for update of t for key share of c
    ), verdict as (
        select *, case when kind = 'refuse' then 'refuse'
                       when campaign_state = 'cancelled' then 'cancelled'
                       when kind = 'retry' and attempt >= 5 then 'retry'
                       when kind = 'lost' and lost + 1 >= 20 then 'lost'
                  end as ending
        from held
    ), back as (
        update task t
        set state = 0, worker = null, lease_until = null,
            attempt = t.attempt - (v.kind in ('lost', 'released'))::int,
            lost = t.lost + (v.kind = 'lost')::int,
            not_before = case v.kind
                when 'retry' then clock_timestamp() + least(300, 2 ^ t.attempt) * (0.75 + 0.5 * random()) * interval '1 s'
                else '-infinity' end
        from verdict v
        where t.id = v.id and v.ending is null and t.state + 0 = 1
    ), gone as (
        delete from task t using verdict v
        where t.id = v.id and v.ending is not null and t.state + 0 = 1
        returning t.*, v.kind as asked_kind, v.ending,
                  case v.ending when 'cancelled' then 'the campaign was cancelled' else v.reason end as why
    ), kept as (
        insert into outcome (task_id, campaign_id, group_id, lease_token, attempt, lost, row, variation, truncate, state,
                             kind, reason, seed, content_key, worker, file, name, prompt, negative, labels, inputs)
        select id, campaign_id, group_id, lease_token, attempt - (asked_kind in ('lost', 'released'))::int,
               lost + (asked_kind = 'lost')::int, row, variation, truncate, 'failed', ending, why, seed, content_key, worker, file, name, prompt, negative, labels,
               inputs
        from gone
    ), counted as (
        insert into campaign_count (campaign_id, failed, cancelled)
        select campaign_id, count(*), count(*) filter (where ending = 'cancelled') from gone group by campaign_id
    )
    select l.n from listed l
    where (l.task_id, l.token) in (select id, token from held)
       or exists (select from task t where t.id = l.task_id and t.lease_token = l.token and t.state = 0)
       or exists (select from outcome o where o.task_id = l.task_id and o.lease_token = l.token and o.state = 'failed')
$$;

insert into schema_version (version, name) values (3, '003_cancelled');
commit;
