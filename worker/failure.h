/* failure.h - the one place that decides what a failure means to the farm.
 *
 *   refuse    the row is wrong: never again                 oom       again, in smaller batches
 *   retry     it may work later, here or elsewhere          released  not attempted: goes back uncounted
 *
 * An engine fault becomes one of these here and nowhere else. */
#ifndef KILN_FAILURE_H
#define KILN_FAILURE_H

#include "engine_error.h"
#include "msg.h"

struct failure {
    enum msg_failure kind;
    bool is_last;    /* the device is gone or the weights are others: this process must end and be started again */
    char reason[1280]; /* UTF-8, whatever the bytes it was made of */
};

struct failure failure_of_engine(const struct engine_error *why);
struct failure failure_refuse(const char *format, ...) __attribute__((format(printf, 1, 2)));
struct failure failure_retry(const char *format, ...) __attribute__((format(printf, 1, 2)));
struct failure failure_released(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* failure_make_sendable: a text may quote a prompt or a path cut in the middle of a character, or a path that never was
 * UTF-8. Such bytes become '?': a message that holds them could not be sent, and whoever waits for it would wait in vain. */
void failure_make_sendable(char *text);

/* failure_is_of_one: could a single request of a batch be the cause? Then the batch is rendered singly to find it. */
bool failure_is_of_one(enum engine_fault fault);

#endif
