-- submit_staging.sql - where COPY puts a chunk of a submit. Ids are given here, in the order of the rows.
--   \i submit_staging.sql
create temporary table if not exists submit_row (
    id bigint not null default nextval('task_id'), row int, variation int, width int, height int, steps int,
    guidance float8, seed numeric, truncate boolean, content_key uuid, model text, file text, name text, prompt text,
    negative text, labels jsonb, inputs text, layout text, loras text
) on commit delete rows;
