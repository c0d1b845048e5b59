-- audit_counters.sql - how often: the counters of a campaign are not the number of its outcomes. $1 campaign name text, or null for all
--   \set audit `cat audit_counters.sql`
--   prepare audit as :audit
--   execute audit(null);
select count(*)
from campaign c
left join (select campaign_id, sum(done) as done, sum(failed) as failed, sum(cancelled) as cancelled from campaign_count group by 1) k
    on k.campaign_id = c.id
left join (select campaign_id, count(*) filter (where state = 'done') as done,
                  count(*) filter (where state = 'failed') as failed,
                  count(*) filter (where state = 'failed' and kind = 'cancelled') as cancelled from outcome group by 1) o on o.campaign_id = c.id
where ($1::text is null or c.name = $1::text)
  and (c.done + coalesce(k.done, 0) <> coalesce(o.done, 0) or c.failed + coalesce(k.failed, 0) <> coalesce(o.failed, 0)
       or c.cancelled + coalesce(k.cancelled, 0) <> coalesce(o.cancelled, 0));
