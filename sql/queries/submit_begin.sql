-- submit_begin.sql - may this campaign take more rows? $1 campaign bigint
--   \set begin `cat submit_begin.sql`
--   prepare submit_begin as :begin
--   execute submit_begin(1);
select name, state = 'cancelled' from campaign where id = $1::bigint;
