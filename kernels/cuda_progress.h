/* cuda_progress.h - does the device get on? Whoever waits for it waits here, and not for ever. */
#ifndef KILN_CUDA_PROGRESS_H
#define KILN_CUDA_PROGRESS_H

#include "cuda_ops.h"

/* cuda_progress_open: NULL after the first error is kept. Everything below accepts NULL: of a backend that could not be opened. */
struct cuda_progress *cuda_progress_open(struct kern *k);
void cuda_progress_close(struct cuda_progress *p);

/* cuda_progress_launched: a kernel was queued. cuda_progress_mark: something that takes long was. By the backend's thread. */
void cuda_progress_launched(struct cuda_progress *p);
void cuda_progress_mark(struct cuda_progress *p);

/* cuda_progress_wait returns when the event has come, or, with NULL, all that was queued is done: true without asking whether it went
 * well. False: the error is kept, and the device may be stuck. */
bool cuda_progress_wait(struct cuda_progress *p, cudaEvent_t event);

/* cuda_progress_is_stuck: work of the device, or of another of its team, does not end. Whatever would wait for it must not be called any
 * more: neither what is running nor the memory it uses can be had back before the process ends. */
bool cuda_progress_is_stuck(const struct cuda_progress *p);

/* cuda_progress_ask: cudaEventQuery, whose cudaErrorNotReady is no error to whoever asks for the last one next. */
cudaError_t cuda_progress_ask(cudaEvent_t event);

/* For the thread that looks after a team. cuda_progress_look: LATE: given up, for good; why says so. cuda_progress_excuse, before: it is
 * another rank that is waited for. */
enum cuda_progress_state { CUDA_PROGRESS_IDLE, CUDA_PROGRESS_AT_WORK, CUDA_PROGRESS_LATE };
enum cuda_progress_state cuda_progress_look(struct cuda_progress *p, char *why, size_t why_bytes);
void cuda_progress_excuse(struct cuda_progress *p);

#endif
