-- Plans, with the session settings of the coordinator: by index, whether the tables have statistics or not. If these break,
-- the farm works in the tests and stands still at the first campaign of a million images.
\i tests/sql/setup.psql
select plan(16);
\set q `cat sql/queries/claim.sql`
prepare claim as :q
\set q `cat sql/queries/finish.sql`
prepare finish as :q
\set q `cat sql/queries/extend.sql`
prepare extend as :q
\set q `cat sql/queries/offer.sql`
prepare offer as :q
create function pg_temp.finish_args(task bigint, token bigint) returns text language sql as $$
    select format('finish(array[%s], array[%s], array[''w''], array[sha256(''x'')], array[''d''], array[900], array[7], array[512],'
                  ' array[512], array[4], array[1.0], array[0.5], array[false])', task, token)
$$;
set local plan_cache_mode = force_generic_plan;
set local enable_seqscan = off;
set local enable_bitmapscan = off;
set local enable_mergejoin = off;
set local enable_hashjoin = off;

-- plan_of: the plan's text. buffers_of: how many pages it really touches.
create function pg_temp.plan_of(statement text) returns text language plpgsql as $$
declare line text; all_lines text := '';
begin
    for line in execute 'explain ' || statement loop all_lines := all_lines || line || E'\n'; end loop;
    return all_lines;
end $$;
create function pg_temp.buffers_of(statement text) returns int language plpgsql as $$
declare plan json;
begin
    execute 'explain (analyze, buffers, format json) ' || statement into plan;
    return (plan->0->'Plan'->>'Shared Hit Blocks')::int + (plan->0->'Plan'->>'Shared Read Blocks')::int;
end $$;

select pg_temp.make_campaign(1, 1);
\set claim_one 'execute claim(1, array[''w''], 1000, 0)'
\set extend_one 'execute extend(array[1001], array[1], 1000)'

-- The plans are made now, while the tables are as good as empty and have no statistics ...
select matches(pg_temp.plan_of(:'claim_one'), 'Index Scan using task_ready', 'the claim goes by the partial index');
select matches(pg_temp.plan_of(:'claim_one'), 'Index Scan using task_pkey on task t .*\n.*Index Cond: \(id = n.id\)', '... and updates by id');
select matches(pg_temp.plan_of(:'extend_one'), 'Index Scan using task_pkey on task t', 'extend goes by id');
select matches(pg_temp.plan_of('execute ' || pg_temp.finish_args(1001, 1)), 'Index Scan using task_pkey', 'finish goes by id');
select unalike(pg_temp.plan_of('execute offer(256)'), '%Seq Scan on task %', 'the offer goes by index');

-- ... and must be good when they hold 60,000 tasks in 600 groups a moment later.
insert into task_group (id, campaign_id, model, width, height, steps, guidance) overriding system value
    select 100 + i, 1, 'm' || i, 512, 512, 4, 1 from generate_series(1, 600) i;
insert into task (id, campaign_id, group_id, row, variation, truncate, seed, content_key, file, prompt)
    select 100000 + i, 1, 101 + i / 100, i, 0, false, i, md5(i::text)::uuid, i || '.png', repeat('p', 80) from generate_series(0, 59999) i;
insert into task (id, campaign_id, group_id, row, variation, truncate, seed, content_key, file, prompt)
    select 200000 + i, 1, 1, i, 0, false, i, md5(i::text)::uuid, 'x' || i || '.png', repeat('p', 80) from generate_series(0, 19999) i;
select cmp_ok(pg_temp.buffers_of(:'claim_one'), '<', 60, 'a claim touches a few pages');
select cmp_ok(pg_temp.buffers_of(:'extend_one'), '<', 20, 'an extension touches a few pages');
select cmp_ok(pg_temp.buffers_of('execute ' || pg_temp.finish_args(1001, 1)), '<', 60, 'a finish touches a few pages');
select cmp_ok(pg_temp.buffers_of('execute offer(256)'), '<', 15000, 'an offer touches a few pages per group');
analyze task;
analyze task_group;
select matches(pg_temp.plan_of(:'claim_one'), 'Index Scan using task_ready', 'with statistics: the claim goes by the partial index');
select cmp_ok(pg_temp.buffers_of(:'claim_one'), '<', 60, '... and touches a few pages');
select cmp_ok(pg_temp.buffers_of('execute claim(1, array_fill(''w''::text, array[256]), 1000, 0)'), '<', 8000, '256 tasks: a few pages each');
select cmp_ok(pg_temp.buffers_of(:'extend_one'), '<', 20, 'with statistics: an extension');
select cmp_ok(pg_temp.buffers_of('execute ' || pg_temp.finish_args(200000, 1)), '<', 60, 'with statistics: a finish');

-- A group of which 20,000 rows wait out a backoff and one may go: the claim must not walk over them.
insert into task_group (id, campaign_id, model, width, height, steps, guidance) overriding system value values (50, 1, 'late', 512, 512, 4, 1);
insert into task (id, campaign_id, group_id, not_before, row, variation, truncate, seed, content_key, file, prompt)
    select 300000 + i, 1, 50, case when i < 19999 then now() + interval '1 h' else '-infinity' end, i, 0, false, i, md5(i::text)::uuid, 'y' || i || '.png', 'p'
    from generate_series(0, 19999) i;
select cmp_ok(pg_temp.buffers_of('execute claim(50, array[''w'', ''w''], 1000, 0)'), '<', 60, 'rows that wait are not walked over');

-- The trap itself, so that nobody undoes the literal: as a parameter the state misses the partial index.
prepare trap (smallint) as select id from task where group_id = 1 and state = $1 order by not_before, id limit 1;
select unalike(pg_temp.plan_of('execute trap(0::smallint)'), '%task_ready%', 'a state given as parameter misses the partial index');
select * from finish();
rollback;
