-- announce.sql - wakes coordinators: there may be something to claim. Once per submit, resume or retry, never per task.
--   \i announce.sql
notify kiln_tasks;
