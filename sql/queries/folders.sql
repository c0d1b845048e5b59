-- folders.sql - the output folders that may still have staged files: of campaigns with work left, or that changed
-- within 30 days (the last file of a campaign may have been committed and not yet renamed when everything went down).
--   \i folders.sql
select distinct c.out_dir
from campaign c
left join lateral (select sum(k.done + k.failed) as ended from campaign_count k where k.campaign_id = c.id) k on true
where c.touched_at > now() - interval '30 days' or k.ended is not null or c.total > c.done + c.failed
order by c.out_dir;
