/* Memory: lock-prefixed instructions; one unit is 4000 of them. */
#include "bench.h"

static uint64_t cells[64];

static uint64_t work(uint64_t units, const char *variant) {
    (void)variant;
    uint64_t sum = 0;
    for (uint64_t i = 0; i < units * 1000; i++) {
        uint64_t *cell = &cells[i % 64];
        uint64_t seen = __atomic_fetch_add(cell, i, __ATOMIC_SEQ_CST);
        __atomic_compare_exchange_n(cell, &seen, seen ^ i, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
        __atomic_or_fetch(cell, 1, __ATOMIC_SEQ_CST);
        sum += __atomic_exchange_n(cell, seen, __ATOMIC_SEQ_CST);
    }
    return sum;
}

BENCH("atomics", bench_nothing, work)
