-- fold.sql - additions older than five minutes go into their campaign's own counters. Run by the sweep's holder.
-- $1 coordinator text
--   \set fold `cat fold.sql`
--   prepare fold as :fold
--   execute fold('coordinator-1');
-- Campaigns that somebody else holds are left for the next time.
with free as (
    select c.id from campaign c
    where exists (select from duty d where d.name = 'sweep' and d.holder = $1::text)
      and exists (select from campaign_count k where k.campaign_id = c.id and k.at < clock_timestamp() - interval '5 min')
    for no key update skip locked
), old as (
    delete from campaign_count k using free
    where k.campaign_id = free.id and k.at < clock_timestamp() - interval '5 min'
    returning k.campaign_id, k.done, k.failed, k.cancelled, k.at
), sums as (
    select campaign_id, sum(done) as done, sum(failed) as failed, sum(cancelled) as cancelled, max(at) as at from old group by campaign_id
)
update campaign c
set done = c.done + s.done, failed = c.failed + s.failed, cancelled = c.cancelled + s.cancelled,
    touched_at = greatest(c.touched_at, s.at)
from sums s
where c.id = s.campaign_id;
