/* Kernel: context switches. Two processes on one processor pass a byte to and fro; one unit is 100 round trips. */
#include "bench.h"
#include <sched.h>
#include <sys/wait.h>

static int there[2], back[2];

/* Stay on the processor we are on, as in a guest that has only one. */
static void prepare(const char *variant) {
    (void)variant;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(sched_getcpu(), &set);
    sched_setaffinity(0, sizeof set, &set);
    if (pipe(there) || pipe(back))
        bench_die("pipe");
}

static void echo(void) {
    char byte;
    while (read(there[0], &byte, 1) == 1) {
        byte++;
        if (write(back[1], &byte, 1) != 1)
            break;
    }
    _exit(0);
}

static uint64_t work(uint64_t units, const char *variant) {
    (void)variant;
    pid_t child = fork();
    if (child < 0)
        bench_die("fork");
    if (child == 0) {
        close(there[1]);
        echo();
    }
    char byte = 0;
    for (uint64_t i = 0; i < units * 100; i++) {
        if (write(there[1], &byte, 1) != 1 || read(back[0], &byte, 1) != 1)
            bench_die("pipe");
    }
    close(there[1]);
    waitpid(child, NULL, 0);
    return (uint8_t)byte;
}

BENCH("pipe", prepare, work)
