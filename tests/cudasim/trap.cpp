/* trap.cpp - a bad address inside a kernel becomes a CUDA error, and a kernel that does not end is ended.
 *
 * The handler runs on a stack of its own, notes the signal and address, and changes the saved registers so that the
 * return from the signal continues in the worker's own stack, right after its switch into the block (cudasim_resume).
 * The fiber is abandoned where it stood; kernels hold no locks and own no memory, so nothing is lost. What the address
 * means is found out afterwards, outside the handler.
 * Only in plain x86-64 builds: the sanitizers' own reports, with the line, are better. */
#include <signal.h>
#include <time.h>

#include <cstdlib>
#include <thread>

#include "device.h"
#include "schedule.h"
#include "settings.h"
#include "timer.h"

#ifdef CUDASIM_TRAPS
#include <ucontext.h>
#endif

namespace cudasim
{

static const int LIMIT_SIGNAL = SIGRTMIN + 7;

#ifdef CUDASIM_TRAPS

static struct sigaction previous[64];

static void on_signal(int number, siginfo_t *info, void *saved)
{
    Worker *w = this_worker;
    if (!w || !current || w->trap_signal) {
        if (number == LIMIT_SIGNAL)
            return;
        /* Not a kernel: the process's own fault, handled as if we were not here. */
        sigaction(number, &previous[number], nullptr);
        return;
    }
    w->trap_signal = number;
    w->trap_address = info->si_addr;
    ucontext_t *registers = static_cast<ucontext_t *>(saved);
    registers->uc_mcontext.gregs[REG_RSI] = reinterpret_cast<greg_t>(w->main.stack_pointer);
    registers->uc_mcontext.gregs[REG_RIP] = reinterpret_cast<greg_t>(cudasim_resume);
}

static void install_process()
{
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
    sigemptyset(&action.sa_mask);
    for (int number : {SIGSEGV, SIGBUS, SIGFPE})
        sigaction(number, &action, &previous[number]);
    sigaction(LIMIT_SIGNAL, &action, nullptr);
}

void trap_install_thread(Worker *w)
{
    static std::once_flag once;
    std::call_once(once, install_process);
    enum { STACK_BYTES = 64 << 10 };
    stack_t stack = {};
    stack.ss_sp = malloc(STACK_BYTES); /* kept for the life of the thread, which is the process's */
    stack.ss_size = STACK_BYTES;
    if (!stack.ss_sp || sigaltstack(&stack, nullptr))
        settings_die("no signal stack for a worker");
    if (settings().kernel_limit_ms > 0)
        std::thread(trap_watch, w).detach();
}

#else

void trap_install_thread(Worker *w)
{
    if (settings().kernel_limit_ms > 0)
        std::thread(trap_watch, w).detach();
}

#endif

/* trap_watch ends a block that runs longer than the limit: a loop that waits for what never comes. */
void trap_watch(Worker *w)
{
    double limit = static_cast<double>(settings().kernel_limit_ms);
    for (;;) {
        timespec pause = {0, 10 * 1000000L};
        nanosleep(&pause, nullptr);
        double start = w->block_start_ms;
        if (start == 0 || timer_ms() - start < limit)
            continue;
#ifdef CUDASIM_TRAPS
        pthread_kill(w->os_thread, LIMIT_SIGNAL);
#else
        settings_die("a kernel ran longer than CUDASIM_KERNEL_LIMIT_MS; this build cannot end it");
#endif
    }
}

cudaError_t trap_code(const Worker *w)
{
    if (w->trap_signal == LIMIT_SIGNAL)
        return cudaErrorLaunchTimeout;
    return w->trap_signal == SIGFPE ? cudaErrorLaunchFailure : cudaErrorIllegalAddress;
}

static std::string address_text(Worker *w, const char *address)
{
    const char *shared = reinterpret_cast<const char *>(w->shared);
    size_t shared_bytes = w->kernel->launch->shared_bytes;
    if (shared && address >= shared && address < shared + shared_bytes + (128 << 10))
        return "byte " + std::to_string(address - shared) + " of " + std::to_string(shared_bytes) +
               " bytes of dynamic shared memory";
    const Thread *t = w->threads[0];
    for (int i = 0; i < w->thread_count; i++) {
        t = w->threads[i];
        const char *stack = static_cast<const char *>(t->context.stack);
        if (address < stack && address >= stack - 4096)
            return "the stack of thread " + std::to_string(i) + ", which overflowed (CUDASIM_STACK_KB)";
    }
    return device_describe(address);
}

std::string trap_sentence(Worker *w)
{
    if (w->trap_signal == LIMIT_SIGNAL)
        return block_name(w) + " ran longer than CUDASIM_KERNEL_LIMIT_MS";
    if (w->trap_signal == SIGFPE)
        return "integer division by zero in " + block_name(w);
    return "illegal address in " + block_name(w) + ": " +
           address_text(w, static_cast<const char *>(const_cast<void *>(w->trap_address)));
}

} // namespace cudasim
