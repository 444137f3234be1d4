/* Kernel: signals. Variants kill (a signal to oneself), fault (SIGSEGV on a protected page); one unit is 100. */
#include "bench.h"
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>

static volatile uint64_t seen;
static char *page;

static void on_signal(int number) {
    seen++;
    if (number == SIGSEGV)
        mprotect(page, 4096, PROT_READ | PROT_WRITE);
}

static void prepare(const char *variant) {
    (void)variant;
    struct sigaction action = {.sa_handler = on_signal};
    sigaction(SIGUSR1, &action, NULL);
    sigaction(SIGSEGV, &action, NULL);
    page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED)
        bench_die("mmap");
}

static uint64_t work(uint64_t units, const char *variant) {
    pid_t self = getpid();
    for (uint64_t i = 0; i < units * 100; i++) {
        if (*variant == 'f') {
            mprotect(page, 4096, PROT_NONE);
            *(volatile char *)page = 1;
        } else {
            kill(self, SIGUSR1);
        }
    }
    return seen;
}

BENCH("signal", prepare, work)
