-- submit_lock.sql - submits of one campaign take turns, chunk by chunk: their keys come in any order, and two
-- transactions that insert the same keys in different orders would wait for each other. $1 campaign bigint
-- Nested loops are off until the end of the transaction: the staging table has no statistics, and the planner takes
-- twenty thousand rows for few.
--   \set lock `cat submit_lock.sql`
--   prepare submit_lock as :lock
--   begin; execute submit_lock(1);
select set_config('enable_nestloop', 'off', true),
       pg_advisory_xact_lock(1802071150, ($1::bigint % 2147483647)::int);
