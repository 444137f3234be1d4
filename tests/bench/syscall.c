/* Kernel: cheap system calls. Variants getpid, read (4 KiB of /dev/zero), stat; one unit is 1000 calls. */
#include "bench.h"
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>

static int zero = -1;
static char buffer[4096];

static void prepare(const char *variant) {
    (void)variant;
    zero = open("/dev/zero", O_RDONLY);
    if (zero < 0)
        bench_die("/dev/zero");
}

static uint64_t one(const char *variant) {
    struct stat info;
    switch (*variant) {
    case 'r':
        return (uint64_t)read(zero, buffer, sizeof buffer);
    case 's':
        return stat("/dev/zero", &info) == 0 && S_ISCHR(info.st_mode);
    default:
        return syscall(SYS_getpid) > 0;
    }
}

static uint64_t work(uint64_t units, const char *variant) {
    uint64_t sum = 0;
    for (uint64_t i = 0; i < units * 1000; i++)
        sum += one(variant);
    return sum;
}

BENCH("syscall", prepare, work)
