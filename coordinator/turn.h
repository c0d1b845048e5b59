/* turn.h - one turn with the database: what is put into it, and what its answer means.
 *
 * In one commit: the leases, results and failures that wait, and the claims for whoever has room then. An answer is
 * carried out in the order that workers rely on: first the acks, which free credit, then the assignments that use it. */
#ifndef KILN_TURN_H
#define KILN_TURN_H

#include "coordinator.h"

void turn_begin(struct coordinator *c, int64_t now_ms); /* when there is something to do; the database is idle */
void turn_end(struct coordinator *c, int64_t now_ms);   /* its answer is there */
void turn_lost(struct coordinator *c);                  /* the connection died: all of it is asked again */
int64_t turn_offer_ms(const struct coordinator *c);     /* when the offer is asked for next */

#endif
