-- campaign_cancel.sql - ready tasks of a campaign become failures of kind 'cancelled'. After campaign_lock.sql and
-- campaign_state.sql, in their transaction. $1 campaign bigint. Running ones learn it when their lease is extended.
--   \set cancel `cat campaign_cancel.sql`
--   prepare cancel as :cancel
--   execute cancel(1);
with gone as (
    delete from task t
    using task_group g
    where g.campaign_id = $1::bigint and t.group_id = g.id and t.state = 0
    returning t.*
), kept as (
    insert into outcome (task_id, campaign_id, group_id, lease_token, attempt, lost, row, variation, truncate, state, kind,
                         reason, seed, content_key, worker, file, name, prompt, negative, labels, inputs)
    select id, campaign_id, group_id, lease_token, attempt, lost, row, variation, truncate, 'failed', 'cancelled',
           'the campaign was cancelled', seed, content_key, worker, file, name, prompt, negative, labels, inputs
    from gone
), counted as (
    insert into campaign_count (campaign_id, failed, cancelled) select $1::bigint, count(*), count(*) from gone having count(*) > 0
)
select count(*) from gone;
