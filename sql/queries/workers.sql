-- workers.sql - every worker that was ever heard.
--   \i workers.sql
select name, state, device, models, host, boot_epoch, held, extract(epoch from clock_timestamp() - seen_at)::float8, done
from worker order by name;
