-- submit_content.sql - claims the content keys of a chunk; the known ones change nothing. $1 campaign bigint
--   \set content `cat submit_content.sql`
--   prepare content as :content
--   execute content(1);
-- Answers rows in the chunk, and how many of them are new.
with fresh as (
    insert into content (campaign_id, content_key, task_id, file)
    select $1::bigint, content_key, id, file from submit_row
    on conflict (campaign_id, content_key) do nothing
    returning 1
)
select (select count(*) from submit_row), (select count(*) from fresh);
