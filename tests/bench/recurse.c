/* Integer: call and return. One unit is fib(20) and all solutions of seven queens. */
#include "bench.h"

__attribute__((noipa)) static uint64_t fib(uint64_t n) {
    BENCH_OPAQUE(n);
    return n < 2 ? n : fib(n - 1) + fib(n - 2);
}

__attribute__((noipa)) static uint64_t queens(uint32_t all, uint32_t columns, uint32_t left, uint32_t right) {
    if (columns == all)
        return 1;
    uint64_t count = 0;
    for (uint32_t free = all & ~(columns | left | right); free; free &= free - 1) {
        uint32_t bit = free & -free;
        count += queens(all, columns | bit, (left | bit) << 1, (right | bit) >> 1);
    }
    return count;
}

static uint64_t work(uint64_t units, const char *variant) {
    (void)variant;
    uint64_t sum = 0;
    while (units--)
        sum = bench_mix(sum, fib(20) + queens(0x7f, 0, 0, 0));
    return sum;
}

BENCH("recurse", bench_nothing, work)
