-- audit_doubled_images.sql - how often: two images of a campaign share a file or a content key. $1 campaign name text, or null for all
--   \set audit `cat audit_doubled_images.sql`
--   prepare audit as :audit
--   execute audit(null);
select (select count(*) from (select from image i join campaign c on c.id = i.campaign_id
                              where $1::text is null or c.name = $1::text
                              group by i.campaign_id, i.file having count(*) > 1) f)
     + (select count(*) from (select from outcome o join campaign c on c.id = o.campaign_id
                              where o.state = 'done' and ($1::text is null or c.name = $1::text)
                              group by o.campaign_id, o.content_key having count(*) > 1) k);
