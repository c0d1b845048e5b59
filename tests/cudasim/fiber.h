/* fiber.h - a CUDA thread as a fiber: a stack, and a switch from one stack to another on the same OS thread.
 *
 * The switch saves what the ABI says a callee keeps and costs about 10 ns. ucontext (other CPUs, or -DCUDASIM_UCONTEXT)
 * makes a system call for the signal mask and is 25 to 35 times slower.
 * Both sanitizers must be told of every switch: AddressSanitizer of the new stack's bounds, ThreadSanitizer of the
 * fiber; the latter with "no synchronisation", because running one after the other on a CPU orders nothing on a GPU. */
#ifndef CUDASIM_FIBER_H
#define CUDASIM_FIBER_H

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) && !defined(CUDASIM_UCONTEXT)
#define CUDASIM_UCONTEXT
#endif
#ifdef CUDASIM_UCONTEXT
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef CUDASIM_TSAN
extern "C" {
void *__tsan_get_current_fiber(void);
void *__tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void *fiber);
void __tsan_switch_to_fiber(void *fiber, unsigned flags);
void __tsan_acquire(void *address);
void __tsan_release(void *address);
}
#endif

/* Without sanitizers a fault inside a kernel becomes a CUDA error (trap.cpp); with them it is the sanitizer's report. */
#if defined(__x86_64__) && !defined(CUDASIM_UCONTEXT) && !defined(__SANITIZE_ADDRESS__) && !defined(CUDASIM_TSAN)
#define CUDASIM_TRAPS 1
#endif

extern "C" void cudasim_switch(void **save, void *to);
extern "C" void cudasim_resume(void); /* the second half of cudasim_switch, with `to` in rsi: trap.cpp enters here */

namespace cudasim
{

/* order_after and order_before: what happened before a release of this object is ordered before its later acquires. */
#ifdef CUDASIM_TSAN
inline void order_before(void *object)
{
    __tsan_release(object);
}
inline void order_after(void *object)
{
    __tsan_acquire(object);
}
#else
inline void order_before(void *)
{
}
inline void order_after(void *)
{
}
#endif

struct Context {
    void *stack_pointer = nullptr;
    void *stack = nullptr;
    size_t stack_bytes = 0;
    void *asan_fake_stack = nullptr;
    void *tsan_fiber = nullptr;
#ifdef CUDASIM_UCONTEXT
    ucontext_t saved;
#endif
};

/* context_start makes the next switch to it enter `entry` on a fresh stack; the stack is mapped at the first call, with
 * a guard page below it. False: no memory. */
bool context_start(Context *context, size_t stack_bytes, void (*entry)());

/* context_adopt makes it the context of the calling OS thread. */
void context_adopt(Context *context);

/* context_abandon says, from `main`, that a fiber is never resumed where it stands: what it did comes before the later
 * order_after of these objects. */
#ifdef CUDASIM_TSAN
inline void context_abandon(Context *main, Context *fiber, void *object, void *other)
{
    __tsan_switch_to_fiber(fiber->tsan_fiber, 1 /* no synchronisation */);
    order_before(object);
    order_before(other);
    __tsan_switch_to_fiber(main->tsan_fiber, 1);
    __tsan_destroy_fiber(fiber->tsan_fiber); /* with the calls it will never return from */
    fiber->tsan_fiber = nullptr;
}
#else
inline void context_abandon(Context *, Context *, void *, void *)
{
}
#endif

inline void context_switch(Context *from, Context *to)
{
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&from->asan_fake_stack, to->stack, to->stack_bytes);
#endif
#ifdef CUDASIM_TSAN
    __tsan_switch_to_fiber(to->tsan_fiber, 1 /* no synchronisation */);
#endif
#ifdef CUDASIM_UCONTEXT
    swapcontext(&from->saved, &to->saved);
#else
    cudasim_switch(&from->stack_pointer, to->stack_pointer);
#endif
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(from->asan_fake_stack, nullptr, nullptr);
#endif
}

/* context_entered is the first thing a fresh fiber does. */
inline void context_entered()
{
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

} // namespace cudasim

#endif
