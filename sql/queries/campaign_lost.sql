-- campaign_lost.sql - images whose files are lost become ready tasks again, with their id and their lease token. It grows at the next
-- claim; from then on who holds the old one is stale. After campaign_lock.sql, in its transaction. $1 campaign bigint, $2 tasks bigint[]
--   \set lost `cat campaign_lost.sql`
--   prepare lost as :lost
--   execute lost(1, '{5,6}');
with gone as (
    delete from outcome o
    where o.campaign_id = $1::bigint and o.state = 'done' and o.task_id = any ($2::bigint[])
    returning o.*
), forgotten as (
    delete from image i using gone where i.task_id = gone.task_id
), back as (
    insert into task (id, campaign_id, group_id, lease_token, row, variation, truncate, seed, content_key, file, name, prompt,
                      negative, labels, inputs)
    select task_id, campaign_id, group_id, lease_token, row, variation, truncate, seed, content_key, file, name, prompt,
           negative, labels, inputs
    from gone order by task_id
), counted as (
    insert into campaign_count (campaign_id, done) select $1::bigint, -count(*) from gone having count(*) > 0
)
select count(*) from gone;
