-- 001_tasks.sql - campaigns, their tasks and what became of them.
--
--   campaign ──< task_group ──< task     hot: only what is ready (state 0) or running (state 1)
--       │                         │
--       │                         └──▶ outcome (done | failed) ──▶ image (done only)     cold: what has ended
--       └──< content                   every content key ever submitted: this is what makes a submit idempotent
--       └──< campaign_count            what ended, as small additions: finishers never wait for one another
--
-- A task keeps its id for life, and its lease token only grows, through every claim and every `kiln retry`.
-- No foreign key touches task, outcome or image: they would cost a look-up per row; the audits check instead.
-- There is no index on lease_until: heartbeats move it, and an index would make each of those moves a new
-- version in every index of the table. Expired leases are found by looking through the few running rows.
begin;

create schema if not exists kiln;
set local search_path = kiln;

create table schema_version (
    version    int primary key check (version > 0),
    name       text not null,
    applied_at timestamptz not null default clock_timestamp()
);

create table campaign (
    id         bigint generated always as identity primary key,
    name       text not null unique
               check (octet_length(name) between 1 and 128 and name !~ '[/[:cntrl:]]' and name not in ('.', '..')),
    state      text not null default 'active' check (state in ('active', 'paused', 'cancelled')),
    out_dir    text not null check (octet_length(out_dir) between 1 and 4096),
    format     text not null check (format in ('png', 'jpg', 'webp')),
    use        text not null default '' check (use in ('', 'commercial', 'non-commercial')),
    priority   int not null default 0,
    base_seed  numeric(20) not null check (base_seed between 0 and 18446744073709551615),
    total      bigint not null default 0 check (total >= 0),
    done       bigint not null default 0, -- plus sum(campaign_count.done)
    failed     bigint not null default 0, -- plus sum(campaign_count.failed)
    created_at timestamptz not null default clock_timestamp(),
    touched_at timestamptz not null default clock_timestamp()
) with (fillfactor = 50);

-- Endings, as additions: a turn adds one row per campaign. The janitor folds rows older than five minutes into
-- campaign; younger ones also give the images per second.
create table campaign_count (
    campaign_id bigint not null,
    id          bigint generated always as identity,
    done        bigint not null default 0,
    failed      bigint not null default 0,
    at          timestamptz not null default clock_timestamp(),
    primary key (campaign_id, id)
) with (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_cost_delay = 0, vacuum_truncate = false);

create table task_group (
    id          bigint generated always as identity primary key,
    campaign_id bigint not null references campaign (id),
    model       text not null check (octet_length(model) between 1 and 128),
    width       int not null check (width >= 64 and width % 16 = 0),
    height      int not null check (height >= 64 and height % 16 = 0),
    steps       int not null check (steps between 0 and 1000),  -- 0: the model's default
    guidance    float8 not null check (guidance = 'NaN' or guidance between 0 and 100), -- NaN: the model's default
    unique (campaign_id, model, width, height, steps, guidance),
    constraint task_group_pixels check (width::bigint * height <= 4194304)
);

create table content (
    campaign_id bigint not null,
    content_key uuid not null,
    task_id     bigint not null,
    folder      bigint not null, -- a hash of campaign.out_dir
    file        text collate "C" not null check (octet_length(file) between 1 and 255 and position('/' in file) = 0 and left(file, 1) <> '.'),
    primary key (content_key, campaign_id), -- what differs stands first: one comparison a step, not two
    -- One file, one row. Over folders, not campaigns: two that write to one folder with the same prompts want the same names,
    -- and a file is never replaced.
    constraint content_file unique (folder, file)
);

-- Ids begin somewhere else in every database, below 2^53 because JSON readers round above it. Spool records and staged files
-- are named by task and token and outlive a database that was made anew, and two farms may write into one folder: with ids
-- from 1 the image of another farm's task 1 would be taken for ours.
create sequence task_id as bigint;
do $$ begin perform setval('task_id', (floor(random() * 2147483647) + 1)::bigint * 1048576, false); end $$;

create table task (
    id          bigint primary key check (id > 0),
    campaign_id bigint not null,
    group_id    bigint not null,
    not_before  timestamptz not null default '-infinity',
    lease_token bigint not null default 0 check (lease_token >= 0),
    lease_until timestamptz,
    state       smallint not null default 0 check (state in (0, 1)), -- 0 ready, 1 running
    attempt     int not null default 0 check (attempt >= 0),
    lost        int not null default 0 check (lost >= 0),
    row         int not null check (row >= 0),
    variation   int not null check (variation >= 0),
    truncate    boolean not null,
    seed        numeric(20) not null check (seed between 0 and 18446744073709551615),
    content_key uuid not null,
    worker      text check (octet_length(worker) between 1 and 128),
    file        text not null,
    name        text not null default '',
    prompt      text not null check (octet_length(prompt) <= 65536),
    negative    text not null default '' check (octet_length(negative) <= 65536),
    labels      jsonb,
    constraint task_held check ((state = 1) = (worker is not null and lease_until is not null))
) with (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_insert_scale_factor = 0.1,
        autovacuum_analyze_scale_factor = 0.05, autovacuum_vacuum_cost_delay = 0, vacuum_truncate = false,
        toast.autovacuum_vacuum_scale_factor = 0.05, toast.autovacuum_vacuum_cost_delay = 0);

-- A group's claimable rows, next one first: rows that wait out a backoff stand behind those that may go now.
create index task_ready on task (group_id, not_before, id) where state = 0;
create index task_running on task (campaign_id) where state = 1;

create table outcome (
    task_id     bigint primary key,
    campaign_id bigint not null,
    group_id    bigint not null,
    lease_token bigint not null,
    ended_at    timestamptz not null default clock_timestamp(),
    attempt     int not null,
    lost        int not null,
    row         int not null,
    variation   int not null,
    truncate    boolean not null,
    state       text not null check (state in ('done', 'failed')),
    kind        text check (kind in ('refuse', 'retry', 'lost', 'cancelled')),
    reason      text,
    seed        numeric(20) not null,
    content_key uuid not null,
    worker      text,
    file        text not null,
    name        text not null,
    prompt      text not null,
    negative    text not null,
    labels      jsonb,
    constraint outcome_failure check ((state = 'failed') = (kind is not null and reason is not null))
);
create index outcome_done on outcome (campaign_id, row, variation) where state = 'done';
create index outcome_failed on outcome (campaign_id, row, variation) where state = 'failed';

create table image (
    task_id     bigint primary key,
    campaign_id bigint not null,
    lease_token bigint not null check (lease_token > 0),
    finished_at timestamptz not null default clock_timestamp(),
    bytes       bigint not null check (bytes > 0),
    width       int not null check (width >= 64 and width % 16 = 0),
    height      int not null check (height >= 64 and height % 16 = 0),
    steps       int not null check (steps > 0),
    attempt     int not null check (attempt > 0),
    guidance    float8 not null,
    render_s    float8 not null check (render_s >= 0),
    truncated   boolean not null,
    seed        numeric(20) not null check (seed between 0 and 18446744073709551615),
    sha256      bytea not null check (octet_length(sha256) = 32),
    worker      text not null,
    digest      text not null, -- of the model's weights
    file        text not null
);

create table worker (
    name       text primary key check (octet_length(name) between 1 and 128),
    boot_epoch numeric(20) not null,
    state      text not null,
    device     text not null,
    models     text not null,
    host       text not null default '',
    held       int not null,
    done       bigint not null default 0,
    seen_at    timestamptz not null default clock_timestamp()
) with (fillfactor = 50, autovacuum_vacuum_cost_delay = 0, vacuum_truncate = false);

-- What must happen in one place at a time. term grows with each new holder.
create table duty (
    name   text primary key,
    holder text not null,
    term   bigint not null,
    until  timestamptz not null
) with (fillfactor = 50);

-- give_back ends the lease of running tasks that did not become an image and answers the positions (from 1) of
-- those it accepts. fail.sql (workers' reports) and sweep.sql (leases that ended) share it.
--   refuse     failed at once: the row is wrong
--   retry      ready again after a backoff; failed at the 5th attempt
--   lost       the worker went away: ready at once; failed at the 20th loss
--   released   not begun: ready at once, as if never claimed
-- In a cancelled campaign nothing becomes ready again. The key share lock meets the FOR UPDATE of a cancel that runs at
-- the same time (either it sees what we give back, or we see that it is cancelled), and nothing else.
-- Asked again with the same token, the answer is the same, until somebody claims the task.
-- state + 0: see queries/claim.sql.
create function give_back(tasks bigint[], tokens bigint[], kinds text[], reasons text[])
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
                             kind, reason, seed, content_key, worker, file, name, prompt, negative, labels)
        select id, campaign_id, group_id, lease_token, attempt - (asked_kind in ('lost', 'released'))::int,
               lost + (asked_kind = 'lost')::int, row, variation, truncate, 'failed', ending, why, seed, content_key, worker, file, name, prompt, negative, labels
        from gone
    ), counted as (
        insert into campaign_count (campaign_id, failed) select campaign_id, count(*) from gone group by campaign_id
    )
    select l.n from listed l
    where (l.task_id, l.token) in (select id, token from held)
       or exists (select from task t where t.id = l.task_id and t.lease_token = l.token and t.state = 0)
       or exists (select from outcome o where o.task_id = l.task_id and o.lease_token = l.token and o.state = 'failed')
$$;

insert into schema_version (version, name) values (1, '001_tasks');
commit;
