-- The life of a task, statement by statement, as an operator could play it in psql: claim, extend, finish, fail, sweep,
-- cancel, retry. If these break, the promise of one image per task does.
\i tests/sql/setup.psql
select plan(47);
select pg_temp.make_campaign(1, 10);
select pg_temp.make_campaign(2, 5);

select results_eq($$select id from pg_temp.claim(1, '{a,a,b}', 60000, 0) order by slot$$, '{1001,1002,1003}'::bigint[], 'claims go by id');
select results_eq('select worker from task where state = 1 order by id', '{a,a,b}'::text[], 'each slot has its worker');
select ok(bool_and(lease_token = 1 and attempt = 1), 'first claim, first token') from task where state = 1;
select ok(bool_and(lease_until between clock_timestamp() + interval '50 s' and clock_timestamp() + interval '60 s'), 'the lease ends by the database''s clock') from task where state = 1;
select results_eq($$select id from pg_temp.claim(1, '{c}', 60000, 0) order by slot$$, '{1004}'::bigint[], 'a running task is not claimed again');
select results_eq($$select id from pg_temp.claim(1, '{c}', 60000, 1008) order by slot$$, '{1008}'::bigint[], 'below the floor nothing is looked at');
select is((select count(*) from pg_temp.claim(99, '{c}', 60000, 0)), 0::bigint, 'no such group, no task');

-- extend
select results_eq($$select pg_temp.extend(array[1001, 1002, 1009, 7], array[1, 2, 1, 1], 1000)$$, '{1}'::bigint[],
                  'alive: ours by token; not: another token, not running, unknown');
select set_eq($$select pg_temp.extend(array[1001, 1001], array[1, 1], 60000)$$, '{1,2}'::bigint[], 'asked twice, answered twice');

-- finish
select results_eq('select pg_temp.finish_one(1001, 1)', '{1}'::bigint[], 'finish commits');
select is((select count(*) from task where id = 1001), 0::bigint, 'the task has left');
select is(state || ' ' || lease_token || ' ' || worker, 'done 1 w', 'its outcome is there') from outcome where task_id = 1001;
select is(file || ' ' || encode(sha256, 'hex'), '1.png ' || encode(sha256('x'), 'hex'), 'its image is there') from image where task_id = 1001;
select is(sum(done), 1::numeric, 'it is counted') from campaign_count where campaign_id = 1;
select results_eq('select pg_temp.finish_one(1001, 1)', '{1}'::bigint[], 'asked again: committed');
select is(sum(done), 1::numeric, '... and counted once') from campaign_count where campaign_id = 1;
select is_empty('select pg_temp.finish_one(1001, 2)', 'another token is stale');
select is_empty('select pg_temp.finish_one(1010, 0)', 'nobody finishes what was never claimed');

-- fail
select results_eq($$select pg_temp.fail(array[1002, 1003, 1004, 1005], array[1, 1, 1, 1], array['retry', 'refuse', 'released', 'lost'], array['r', 'too long', '', ''])$$,
                  '{1,2,3}'::bigint[], 'three were running with this token; 1005 was not');
select ok(state = 0 and attempt = 1 and not_before between clock_timestamp() + interval '1 s' and clock_timestamp() + interval '3 s', 'retry waits about 2 s') from task where id = 1002;
select is(kind || ': ' || reason, 'refuse: too long', 'refuse is final') from outcome where task_id = 1003;
select ok(state = 0 and attempt = 0 and not_before = '-infinity', 'released is as if never claimed') from task where id = 1004;
select is(lease_token, 1::bigint, '... but its token stays') from task where id = 1004;
select results_eq($$select pg_temp.fail(array[1002, 1003], array[1, 1], array['retry', 'refuse'], array['r', 'x'])$$, '{1,2}'::bigint[], 'asked again, accepted again');
select is(sum(failed), 1::numeric, '... and counted once') from campaign_count where campaign_id = 1;
update task set attempt = 9, not_before = '-infinity' where id = 1002;
update task set state = 1, worker = 'w', lease_until = now(), lease_token = 9, attempt = 4 where id = 1005;
select results_eq($$select pg_temp.fail(array[1005], array[9], array['retry'], array['r'])$$, '{1}'::bigint[], 'the fourth attempt');
select ok(not_before < clock_timestamp() + interval '20 s' and not_before > clock_timestamp() + interval '11 s', '... waits about 16 s') from task where id = 1005;

-- sweep
select results_eq($$select id from pg_temp.claim(2, '{dead,live}', 60000, 0) order by slot$$, '{2001,2002}'::bigint[], 'two of another campaign');
update task set lease_until = clock_timestamp() - interval '1 ms' where id = 2001;
select results_eq($$select pg_temp.sweep('c1', 100)$$, '{1}'::bigint[], 'an ended lease is swept');
select ok(state = 0 and lost = 1 and attempt = 0 and worker is null, '... back to ready, counted as lost') from task where id = 2001;
update task set lease_until = clock_timestamp() - interval '1 ms' where id = 2002;
select is_empty($$select pg_temp.sweep('c2', 100)$$, 'somebody else has the duty');
update duty set until = clock_timestamp() - interval '1 ms';
select results_eq($$select pg_temp.sweep('c2', 100)$$, '{1}'::bigint[], '... until it is silent');
select is(holder || term, 'c22', 'the term grows with the holder') from duty;

-- an image of an ended lease
select results_eq('select pg_temp.finish_one(2001, 1)', '{1}'::bigint[], 'nobody claimed it since: welcome');
select results_eq($$select id from pg_temp.claim(2, '{w}', 60000, 0) order by slot$$, '{2002}'::bigint[], 'claimed again');
select is_empty('select pg_temp.finish_one(2002, 1)', 'the first worker is stale');

-- cancel and retry
update campaign set state = 'cancelled' where id = 2;
select results_eq('select pg_temp.campaign_cancel(2)', '{3}'::bigint[], 'a cancel says how many it moved');
select is(count(*), 3::bigint, 'ready ones are cancelled') from outcome where campaign_id = 2 and kind = 'cancelled';
select is_empty($$select pg_temp.extend(array[2002], array[2], 1000)$$, 'the running one is told');
select results_eq($$select pg_temp.fail(array[2002], array[2], array['released'], array[''])$$, '{1}'::bigint[], '... and let go');
select is(kind, 'cancelled', '... into the cancelled') from outcome where task_id = 2002;
select results_eq('select pg_temp.campaign_retry(2)', '{4}'::bigint[], 'a retry says how many it moved');
select is(count(*), 4::bigint, 'retry brings all four back') from task where campaign_id = 2 and state = 0 and attempt = 0;
select is(lease_token, 2::bigint, 'with their tokens') from task where id = 2002;
select is(done + failed, 1::numeric, 'and the counters agree') from (select sum(done) as done, sum(failed) as failed from campaign_count where campaign_id = 2) x;
select is_empty($$select id from pg_temp.claim(2, '{w}', 60000, 0) order by slot$$, 'a campaign that is not active gives nothing');
update campaign set state = 'active' where id = 2;
select is((select count(*) from pg_temp.claim(2, '{w,w,w,w,w}', 60000, 0)), 4::bigint, 'active again, it does');
select * from finish();
rollback;
