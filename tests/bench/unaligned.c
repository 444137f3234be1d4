/* Memory: 8-byte loads and stores at odd addresses, some across cache lines and pages; one unit is 16 KiB. */
#include "bench.h"

enum { SIZE = 16384 };
static uint8_t buffer[SIZE + 64] __attribute__((aligned(4096)));

static uint64_t work(uint64_t units, const char *variant) {
    (void)variant;
    uint64_t sum = 0;
    while (units--) {
        for (size_t i = 1; i < SIZE; i += 9) {
            uint64_t value;
            memcpy(&value, buffer + i, 8);
            value += i;
            memcpy(buffer + i, &value, 8);
            sum += value;
        }
    }
    return sum;
}

BENCH("unaligned", bench_nothing, work)
