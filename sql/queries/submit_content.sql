-- submit_content.sql - claims the content keys of a chunk; rows whose key was there before leave it. $1 campaign bigint
--   \set content `cat submit_content.sql`
--   prepare content as :content
--   execute content(1);
-- Answers rows in the chunk, and how many of them are new.
with fresh as (
    insert into content (campaign_id, content_key, task_id, folder, file)
    select $1::bigint, content_key, id, (select hashtextextended(out_dir, 0) from campaign where id = $1::bigint), file from submit_row
    on conflict (campaign_id, content_key) do nothing
    returning task_id
), known as (
    delete from submit_row
    where (select count(*) from fresh) < (select count(*) from submit_row) -- most chunks are all new: no look at each row
      and id not in (select task_id from fresh)
)
select (select count(*) from submit_row), (select count(*) from fresh);
