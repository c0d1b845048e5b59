-- audit_tokens.sql - how often: a lease token is behind: running or done without a claim, or an image of another claim than its outcome. $1 campaign name text, or null for all
--   \set audit `cat audit_tokens.sql`
--   prepare audit as :audit
--   execute audit(null);
select (select count(*) from task t join campaign c on c.id = t.campaign_id
        where (t.lease_token < t.attempt + t.lost or (t.state = 1 and t.lease_token = 0))
          and ($1::text is null or c.name = $1::text))
     + (select count(*) from outcome o left join image i on i.task_id = o.task_id join campaign c on c.id = o.campaign_id
        where (o.lease_token < o.attempt + o.lost or o.lease_token < i.lease_token
               or (o.state = 'done' and (o.lease_token = 0 or o.lease_token is distinct from i.lease_token)))
          and ($1::text is null or c.name = $1::text));
