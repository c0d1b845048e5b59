-- campaign_status.sql - where campaigns stand. $1 name text, or null for all
--   \set status `cat campaign_status.sql`
--   prepare status as :status
--   execute status(null);
-- Reads counters, never the tasks: campaign's own plus the additions not yet folded in; running is a look through
-- the few running rows. Images per second, while there is something to do: of the last minute; of the last five when
-- that had none; never of the time before the campaign was resumed or submitted to. In the beginning the first addition
-- only starts the clock, because nobody knows how long its images took. No time left is told where tasks wait for a model
-- that no worker has who was heard in the last 20 seconds.
with wanted as (
    select * from campaign c where $1::text is null or c.name = $1::text
), counted as (
    select k.campaign_id, sum(k.done)::bigint as done, sum(k.failed)::bigint as failed,
           sum(k.cancelled)::bigint as cancelled
    from campaign_count k where k.campaign_id in (select id from wanted) group by k.campaign_id
), recent as (
    select w.id as campaign_id, span.s, sum(k.done) as done, min(k.at) as since,
           (array_agg(k.done order by k.at, k.id))[1] as first_done,
           least(span.s, greatest(1, extract(epoch from clock_timestamp() - w.touched_at))) as over_s
    from wanted w
    cross join (values (60), (300)) as span (s)
    join campaign_count k on k.campaign_id = w.id and k.done > 0 and k.at > w.touched_at
                          and k.at > clock_timestamp() - span.s * interval '1 s'
    group by w.id, w.touched_at, span.s
), rate as (
    select distinct on (r.campaign_id) r.campaign_id,
           case when w.done > 0 or exists (select from campaign_count k where k.campaign_id = r.campaign_id
                                           and k.done > 0 and k.at < r.since)
                then r.done / r.over_s
                when r.done > r.first_done
                then (r.done - r.first_done) / greatest(extract(epoch from clock_timestamp() - r.since), 0.001)
           end as images_per_second
    from recent r join wanted w on w.id = r.campaign_id
    order by r.campaign_id, r.s
), holding as (
    select t.campaign_id, count(*) as running from task t where t.state = 1 group by t.campaign_id
), stuck as (
    select g.campaign_id from task_group g
    where g.campaign_id in (select id from wanted)
      and not exists (select from worker x where g.model = any (string_to_array(x.models, ','))
                      and x.seen_at > clock_timestamp() - interval '20 s')
      and exists (select from task t where t.group_id = g.id and t.state = 0)
    group by g.campaign_id
), sums as (
    select w.*, w.done + coalesce(k.done, 0) as all_done, w.failed + coalesce(k.failed, 0) as all_failed,
           w.cancelled + coalesce(k.cancelled, 0) as all_cancelled,
           coalesce(h.running, 0) as running,
           case when w.total > w.done + coalesce(k.done, 0) + w.failed + coalesce(k.failed, 0) then r.images_per_second end as images_per_second,
           exists (select from stuck where campaign_id = w.id) as is_stuck
    from wanted w
    left join counted k on k.campaign_id = w.id
    left join holding h on h.campaign_id = w.id
    left join rate r on r.campaign_id = w.id
)
select id, name,
       case when state = 'cancelled' then state when total > 0 and total = all_done + all_failed then 'done' else state end,
       total, total - all_done - all_failed - running as ready, running, all_done, all_failed,
       images_per_second::float8,
       case when state = 'active' and not is_stuck then ((total - all_done - all_failed) / nullif(images_per_second, 0))::float8 end as eta_s,
       out_dir, format, use, priority, base_seed, all_cancelled
from sums
order by id;
