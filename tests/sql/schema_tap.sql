-- What the tables refuse by themselves, whatever program writes to them. If a bound is lost here, a bad row is found by a
-- GPU instead, hours later.
\i tests/sql/setup.psql
select plan(34);

select is(max(version), 3, 'the schema says its version') from schema_version;
select hasnt_index('kiln', 'task', 'lease_until', 'heartbeats touch no index');
select ok(not exists (select from pg_index i join pg_attribute a on a.attrelid = i.indrelid and a.attnum = any(i.indkey)
                      where i.indrelid = 'task'::regclass and a.attname in ('lease_until', 'worker')),
          'no index holds what an extension moves, so it stays within its page');
select is((select count(*) from pg_constraint where contype = 'f' and conrelid in ('task'::regclass, 'outcome'::regclass)), 0::bigint,
          'no look-up per row on the hot path');
select ok(reloptions::text ~ 'fillfactor=70', 'room for new versions beside the old') from pg_class where oid = 'task'::regclass;

select pg_temp.make_campaign(1, 3);
create function pg_temp.bad_group(w int, h int, s int, g float8) returns text language sql as $$
    select format('insert into task_group (campaign_id, model, width, height, steps, guidance) values (1, ''m'', %s, %s, %s, %L)', w, h, s, g)
$$;
select throws_ok(pg_temp.bad_group(48, 512, 4, 1), '23514', null, 'width below 64');
select throws_ok(pg_temp.bad_group(500, 512, 4, 1), '23514', null, 'width not a multiple of 16');
select throws_ok(pg_temp.bad_group(512, 520, 4, 1), '23514', null, 'height not a multiple of 16');
select throws_ok(pg_temp.bad_group(2048, 2064, 4, 1), '23514', null, 'more than four megapixels');
select throws_ok(pg_temp.bad_group(2147483632, 2147483632, 4, 1), '23514', null, 'a product that overflows 32 bits');
select lives_ok(pg_temp.bad_group(2048, 2048, 4, 1), 'just four megapixels');
select throws_ok(pg_temp.bad_group(512, 512, -1, 1), '23514', null, 'negative steps');
select throws_ok(pg_temp.bad_group(512, 512, 4, -1), '23514', null, 'negative guidance');
select throws_ok(pg_temp.bad_group(512, 512, 4, 'infinity'), '23514', null, 'infinite guidance');
select lives_ok(pg_temp.bad_group(512, 512, 4, 'NaN'), 'guidance by the model');
select throws_ok(pg_temp.bad_group(512, 512, 4, 'NaN'), '23505', null, '... makes one group, not one per row');

select throws_ok('update task set state = 1', '23514', null, 'running needs a worker and a lease');
select throws_ok($$update task set worker = 'w', lease_until = now()$$, '23514', null, 'ready has neither');
select throws_ok('update task set state = 2', '23514', null, 'two states only');
select throws_ok('update task set seed = -1', '23514', null, 'seed below 0');
select throws_ok('update task set seed = 18446744073709551616', '23514', null, 'seed over 64 bits');
select lives_ok('update task set seed = 18446744073709551615', 'the largest seed');
select is(seed::text, '18446744073709551615', '... is readable') from task limit 1;
select throws_ok($$update task set prompt = repeat('x', 65537)$$, '23514', null, 'prompt over 64 KiB');
select throws_ok($$update content set file = 'same.png'$$, '23505', null, 'two tasks never share a file');
select throws_ok($$update content set file = 'a/b.png'$$, '23514', null, 'a file is a plain name');
select throws_ok($$insert into campaign (name, out_dir, format, base_seed) values ('a/b', '/o', 'png', 1)$$, '23514', null, 'a campaign name is a plain name');
select throws_ok($$insert into campaign (name, out_dir, format, base_seed) values ('..', '/o', 'png', 1)$$, '23514', null, '... and no folder above');
select throws_ok($$insert into campaign (name, out_dir, format, base_seed) values (E'a\nb', '/o', 'png', 1)$$, '23514', null, '... of one line');
select throws_ok($$insert into campaign (name, out_dir, format, base_seed) values ('a', '/o', 'gif', 1)$$, '23514', null, 'a format we write');
select throws_ok($$insert into campaign (name, out_dir, format, base_seed) values ('campaign-1', '/o', 'png', 1)$$, '23505', null, 'one campaign, one name');
select throws_ok($$insert into image values (1, 1, 1, now(), 10, 512, 512, 4, 1, 1, 1, false, 1, 'short', 'w', 'd', 'f')$$, '23514', null, 'SHA-256 has 32 bytes');
select throws_ok($$insert into outcome (task_id, campaign_id, group_id, lease_token, attempt, lost, row, variation, truncate, state, seed, content_key, file, name, prompt, negative)
                   values (1, 1, 1, 1, 1, 0, 1, 0, false, 'failed', 1, md5('x')::uuid, 'f', '', '', '')$$, '23514', null, 'a failure has a kind and a reason');
select throws_ok($$insert into schema_version (version, name) values (1, 'again')$$, '23505', null, 'a migration is applied once');
select * from finish();
rollback;
