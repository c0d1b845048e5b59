-- campaign_retry.sql - failures become ready tasks again, with their id and a lease token that goes on growing.
-- After campaign_lock.sql, in its transaction. $1 campaign bigint
--   \set retry `cat campaign_retry.sql`
--   prepare retry as :retry
--   execute retry(1);
with gone as (
    delete from outcome o where o.campaign_id = $1::bigint and o.state = 'failed' returning o.*
), back as (
    insert into task (id, campaign_id, group_id, lease_token, row, variation, truncate, seed, content_key, file, name, prompt,
                      negative, labels, inputs)
    select task_id, campaign_id, group_id, lease_token, row, variation, truncate, seed, content_key, file, name, prompt,
           negative, labels, inputs
    from gone order by task_id
), counted as (
    insert into campaign_count (campaign_id, failed, cancelled)
    select $1::bigint, -count(*), -count(*) filter (where kind = 'cancelled') from gone having count(*) > 0
)
select count(*) from gone;
