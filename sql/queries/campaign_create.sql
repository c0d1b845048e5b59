-- campaign_create.sql - a new campaign; no row when the name is taken.
-- $1 name text, $2 out_dir text, $3 format text, $4 use text, $5 priority int, $6 base seed numeric
--   \set create `cat campaign_create.sql`
--   prepare create_campaign as :create
--   execute create_campaign('cats', '/data/cats', 'png', '', 0, 42);
insert into campaign (name, out_dir, format, use, priority, base_seed)
values ($1::text, $2::text, $3::text, $4::text, $5::int, $6::numeric)
on conflict (name) do nothing
returning id;
