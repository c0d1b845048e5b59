-- audit_duties.sql - how often: a duty has no term, or is held for longer than anybody may hold it. $1 campaign name text, or null for all
--   \set audit `cat audit_duties.sql`
--   prepare audit as :audit
--   execute audit(null);
select count(*) from duty where (term < 1 or holder = '' or until > clock_timestamp() + interval '1 min')
    and ($1::text is null or $1::text is not null);
