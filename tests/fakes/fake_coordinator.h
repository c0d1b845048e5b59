/* fake_coordinator.h - one side of the protocol by hand: a test says and expects messages, a real worker process is
 * on the other end. Everything it starts and makes lives in one folder that fake_coordinator_end removes. */
#ifndef KILN_FAKE_COORDINATOR_H
#define KILN_FAKE_COORDINATOR_H

#include <sys/types.h>

#include "link.h"

#define FAKE_PATIENCE_MS 60000

struct fake_coordinator {
    char dir[64], out_dir[1024], model_dir[128], endpoint[160], spool_dir[160];
    const char *program; /* the worker */
    struct link *link;
    char peer[LINK_PEER_MAX];
    pid_t pid;
    struct msg said;     /* what expect returned last; freed by the next */
    char state[MSG_REASON_MAX + 1]; /* of the last heartbeat */
    uint64_t step_counter;
    uint32_t held, spooled;
    char reasons[64][256]; /* of failures, by task - first_task */
};

void fake_coordinator_begin(struct fake_coordinator *f, const char *program);
void fake_coordinator_end(struct fake_coordinator *f); /* kills the worker if it still runs */
int fake_coordinator_abandon(void **state);            /* teardown: what a failed test left */

/* fault: value of KILN_FAULT or NULL; words: more options, NULL at the end, or NULL. */
void fake_coordinator_start_worker(struct fake_coordinator *f, const char *fault, const char *const *words);
int fake_coordinator_worker_ended(struct fake_coordinator *f); /* waits: exit code, or 128 + signal */
void fake_coordinator_open(struct fake_coordinator *f);
void fake_coordinator_close(struct fake_coordinator *f);

/* expect waits for this kind; heartbeats and progress are noted and passed over, anything else fails the test. */
struct msg *fake_coordinator_expect(struct fake_coordinator *f, enum msg_kind kind);
struct msg *fake_coordinator_expect_any(struct fake_coordinator *f); /* whatever is said next */
/* collect waits until each task has come back and acknowledges it; ret[i] gets 'R' for a result, or the first letter
 * of the failure's kind in small ('r'efuse, 't' for retry, 'o'om, 'l' for released); reasons go to f->reasons. */
void fake_coordinator_collect(struct fake_coordinator *f, uint64_t first_task, uint32_t count, char *ret);
/* quiet: nothing but heartbeats and progress comes for so long. */
void fake_coordinator_expect_quiet(struct fake_coordinator *f, int ms);
void fake_coordinator_expect_state(struct fake_coordinator *f, const char *prefix); /* of heartbeats */

void fake_coordinator_say(struct fake_coordinator *f, const struct msg *m);
void fake_coordinator_welcome(struct fake_coordinator *f); /* expects HELLO, answers; silent_ms 3000 */
/* assign: one task for each prompt, task numbers from first_task, token 1 + task, file "tTASK.png", 64x64, 4 steps. */
void fake_coordinator_assign(struct fake_coordinator *f, uint64_t first_task, const char *const *prompts, uint32_t count);
void fake_coordinator_ack(struct fake_coordinator *f, uint64_t task, uint64_t token, enum msg_verdict verdict);

bool fake_coordinator_has(struct fake_coordinator *f, const char *relative); /* a file in out_dir */
void fake_coordinator_wait_for(struct fake_coordinator *f, const char *relative, bool there);
int fake_coordinator_records(struct fake_coordinator *f); /* spool records on disk */

#endif
