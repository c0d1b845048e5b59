-- A chunk of a submit, as the program sends it. If this breaks, a second submit doubles a campaign.
\i tests/sql/setup.psql
select plan(12);
select pg_temp.make_campaign(1, 3);
create function pg_temp.stage(first int, last int) returns void language sql as $$
    delete from submit_row;
    insert into submit_row (row, variation, width, height, steps, guidance, seed, truncate, content_key, model, file, name, prompt, negative, layout, loras)
    select i, 0, case when i % 2 = 0 then 512 else 256 end, 512, 4, 'NaN', i, false, md5('1/' || i)::uuid, 'tiny', i || '.png', '', 'p', '', '', ''
    from generate_series(first, last) i
$$;
select pg_temp.stage(2, 6); -- 2 and 3 are there
set local enable_nestloop = off; -- as submit_lock.sql does
select pg_temp.submit_groups(1);
select is(count(*), 2::bigint, 'a group for the new shape only') from task_group where campaign_id = 1;
select results_eq('select rows, fresh from pg_temp.submit_content(1)', 'values (5::bigint, 3::bigint)', 'five rows, three new');
select is(count(*), 3::bigint, 'the known rows leave the chunk') from submit_row;
select results_eq('select pg_temp.submit_tasks(1)', '{3}'::bigint[], 'three new tasks');
select results_eq('select row from task where id in (select task_id from content where task_id > 1000000) order by id', '{4,5,6}'::int[], 'ids follow the rows');
select results_eq('select g.width from task t join task_group g on g.id = t.group_id where t.row > 3 order by t.row', '{512,256,512}'::int[], 'each in its group');
select is((select count(distinct content_key) from task), 6::bigint, 'no key twice');
select pg_temp.stage(4, 6);
select results_eq('select rows, fresh from pg_temp.submit_content(1)', 'values (3::bigint, 0::bigint)', 'the same once more: none new');
select is(count(*), 0::bigint, 'submitted again: nothing is left') from submit_row;
select pg_temp.stage(7, 7);
update submit_row set content_key = md5('other')::uuid, file = '6.png';
select throws_ok('select pg_temp.submit_content(1)', '23505', null, 'another image wants the file of an old one');
select lives_ok('select pg_temp.submit_groups(1)', 'groups twice are fine');
select is(count(*), 2::bigint, '... and none is made twice') from task_group where campaign_id = 1;
select * from finish();
rollback;
