/* conversation.h - what workers say and what is answered at once. What needs the database waits in the queue of reports. */
#ifndef KILN_CONVERSATION_H
#define KILN_CONVERSATION_H

#include "coordinator.h"

void conversation_hear(struct coordinator *c, int64_t now_ms);
void conversation_ping(struct coordinator *c);   /* HEARTBEAT to everybody */
/* conversation_lose gives back what a worker holds, because it is silent. */
void conversation_lose(struct coordinator *c, struct fleet_worker *w, int64_t now_ms);
void conversation_cancel(struct coordinator *c, struct fleet_worker *w, uint64_t *tasks, uint32_t count, const char *reason);

#endif
