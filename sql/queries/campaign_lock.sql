-- campaign_lock.sql - holds a campaign still while its state changes. $1 name text
--   \set lock `cat campaign_lock.sql`
--   prepare lock as :lock
--   begin; execute lock('cats');
select id, state from campaign where name = $1::text for update;
