-- submit_lock.sql - begins a chunk: submits of one campaign take turns, because their keys come in any order and two
-- transactions that insert the same keys in different orders would wait for each other. $1 campaign bigint
--   \set lock `cat submit_lock.sql`
--   prepare submit_lock as :lock
--   begin; execute submit_lock(1);
-- A cancel waits for the chunk and then takes its tasks too; finishers do not touch the row. Answers whether the
-- campaign is cancelled. Nested loops are off until the end of the transaction: the staging table has no statistics, and
-- the planner takes twenty thousand rows for few.
select state = 'cancelled', set_config('enable_nestloop', 'off', true)
from campaign where id = $1::bigint for no key update;
