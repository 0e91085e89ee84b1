/* A process that keeps the memory of another one, whose death is quick then: see keeper.py. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#define STACK_BYTES (64 << 10)

static struct { int pidfd, is_apart; } shared;

/* Runs beside its owner, in the same memory and with the thread-local storage of the thread that made it. So it makes
 * bare system calls, which are no cancellation points and fail only where errno may be overwritten: before is_apart. */
static int keep(void *name) {
    struct pollfd owner = {.fd = shared.pidfd, .events = POLLIN};
    if (owner.fd > 0) syscall(SYS_close_range, 0, owner.fd - 1, 0);
    syscall(SYS_close_range, owner.fd + 1, ~0U, 0);
    syscall(SYS_prctl, PR_SET_NAME, name, 0, 0, 0);
    syscall(SYS_setpriority, PRIO_PROCESS, 0, 19);
    __atomic_store_n(&shared.is_apart, 1, __ATOMIC_RELEASE);
    while (syscall(SYS_ppoll, &owner, 1, NULL, NULL, 0) <= 0) {}
    syscall(SYS_exit_group, 0);
    return 0;
}

/* Start a keeper of this process's memory, called `name`. Returns its process id, or -errno. Not to be called by two
 * threads at once. */
int fm_keep_memory(const char *name) {
    sigset_t all, before;
    char *stack = mmap(NULL, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    if (stack == MAP_FAILED) return -errno;
    if ((shared.pidfd = syscall(SYS_pidfd_open, getpid(), 0)) < 0) {
        int error = errno;
        munmap(stack, STACK_BYTES);
        return -error;
    }
    shared.is_apart = 0;
    sigfillset(&all); /* handlers of ours must not run there */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int pid = clone(keep, stack + STACK_BYTES, CLONE_VM | CLONE_PARENT, (void *)name), error = errno;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    while (pid > 0 && !__atomic_load_n(&shared.is_apart, __ATOMIC_ACQUIRE)) sched_yield();
    close(shared.pidfd);
    if (pid < 0) munmap(stack, STACK_BYTES);
    return pid < 0 ? -error : pid;
}
