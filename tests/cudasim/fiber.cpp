/* fiber.cpp - stacks and the switch; see fiber.h. Never instrumented by ThreadSanitizer. */
#include "fiber.h"

#include <pthread.h>
#include <sys/mman.h>

#ifndef CUDASIM_UCONTEXT
asm(R"(
.text
.globl cudasim_switch
.type cudasim_switch,@function
cudasim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
.globl cudasim_resume
.type cudasim_resume,@function
cudasim_resume:
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size cudasim_switch,.-cudasim_switch
.section .note.GNU-stack,"",@progbits
.text
)");
#endif

namespace cudasim
{

static constexpr size_t PAGE = 4096;

bool context_start(Context *c, size_t stack_bytes, void (*entry)())
{
    if (!c->stack) {
        void *map = mmap(nullptr, stack_bytes + PAGE, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (map == MAP_FAILED || mprotect(map, PAGE, PROT_NONE))
            return false;
        c->stack = static_cast<char *>(map) + PAGE;
        c->stack_bytes = stack_bytes;
    }
#ifdef CUDASIM_TSAN
    if (!c->tsan_fiber)
        c->tsan_fiber = __tsan_create_fiber(0);
#endif
#ifdef __SANITIZE_ADDRESS__
    /* A fiber that was abandoned in mid-function left its red zones behind. */
    __asan_unpoison_memory_region(c->stack, c->stack_bytes);
#endif
#ifdef CUDASIM_UCONTEXT
    getcontext(&c->saved);
    c->saved.uc_stack.ss_sp = c->stack;
    c->saved.uc_stack.ss_size = c->stack_bytes;
    c->saved.uc_link = nullptr;
    makecontext(&c->saved, entry, 0);
#else
    /* As if `entry` had been called: the return address, then the six registers cudasim_resume takes back. */
    void **sp = reinterpret_cast<void **>((reinterpret_cast<uintptr_t>(c->stack) + stack_bytes) & ~uintptr_t{15});
    *--sp = nullptr;
    *--sp = reinterpret_cast<void *>(entry);
    for (int i = 0; i < 6; i++)
        *--sp = nullptr;
    c->stack_pointer = sp;
#endif
    return true;
}

void context_adopt(Context *c)
{
#ifdef CUDASIM_TSAN
    c->tsan_fiber = __tsan_get_current_fiber();
#endif
    pthread_attr_t attributes;
    if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
        pthread_attr_getstack(&attributes, &c->stack, &c->stack_bytes);
        pthread_attr_destroy(&attributes);
    }
}

} // namespace cudasim
