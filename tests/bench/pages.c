/* Kernel: memory management. Variants fault (map, touch and unmap 64 pages), protect (mprotect to and fro
 * with a touch each time, 64 times); one unit is one such round. */
#include "bench.h"
#include <sys/mman.h>

enum { PAGES = 64, PAGE = 4096 };

static char *map(void) {
    char *area = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (area == MAP_FAILED)
        bench_die("mmap");
    return area;
}

static uint64_t fault_round(void) {
    volatile char *area = map();
    uint64_t sum = 0;
    for (int i = 0; i < PAGES; i++) {
        area[i * PAGE] = (char)i;
        sum += (uint8_t)area[i * PAGE];
    }
    munmap((void *)area, PAGES * PAGE);
    return sum;
}

static uint64_t protect_round(char *area) {
    for (int i = 0; i < PAGES; i++) {
        if (mprotect(area, PAGE, PROT_READ) || mprotect(area, PAGE, PROT_READ | PROT_WRITE))
            bench_die("mprotect");
        ((volatile char *)area)[0] += 1;
    }
    return (uint8_t)area[0];
}

static uint64_t work(uint64_t units, const char *variant) {
    uint64_t sum = 0;
    char *area = map();
    while (units--)
        sum = bench_mix(sum, *variant == 'p' ? protect_round(area) : fault_round());
    return sum;
}

BENCH("pages", bench_nothing, work)
