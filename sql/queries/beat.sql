-- beat.sql - workers were heard. One element per worker: $1 name text[], $2 boot_epoch numeric[], $3 state text[],
-- $4 device text[], $5 models text[], $6 held int[], $7 host text[]
--   \set beat `cat beat.sql`
--   prepare beat as :beat
--   execute beat(array['gpu-1'], array[1], array['busy'], array['cuda:0'], array['klein-4b'], array[2], array['node7']);
-- Named twice, the last one counts. Sorted by name, so that two coordinators lock in one order.
insert into worker as w (name, boot_epoch, state, device, models, held, host)
select distinct on (name) name, boot_epoch, state, device, models, held, host
from unnest($1::text[], $2::numeric[], $3::text[], $4::text[], $5::text[], $6::int[], $7::text[])
    with ordinality as b (name, boot_epoch, state, device, models, held, host, n)
order by name, n desc
on conflict (name) do update
set boot_epoch = excluded.boot_epoch, state = excluded.state, device = excluded.device, models = excluded.models,
    held = excluded.held, host = excluded.host, seen_at = clock_timestamp();
