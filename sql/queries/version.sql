-- version.sql - the schema's version. Names the schema, because it is asked before anything is known of it.
--   \i version.sql
select coalesce(max(version), 0) from kiln.schema_version;
