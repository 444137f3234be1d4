/* Memory: the C library's memcpy and memset in sizes from 16 bytes to 64 KiB; one unit copies about 1 MiB. */
#include "bench.h"

enum { SIZE = 65536 };
static char from[SIZE + 64], to[SIZE + 64];

static void prepare(const char *variant) {
    (void)variant;
    uint64_t seed = 6;
    for (int i = 0; i < SIZE; i++)
        from[i] = (char)bench_random(&seed);
}

static uint64_t work(uint64_t units, const char *variant) {
    (void)variant;
    uint64_t sum = 0;
    while (units--) {
        for (size_t size = 16; size <= SIZE; size *= 4) {
            size_t rounds = size < 256 ? 1024 : 131072 / size;
            for (size_t i = 0; i < rounds; i++) {
                char *target = to + i % 32;
                BENCH_OPAQUE(target);
                memcpy(target, from, size);
                BENCH_OPAQUE(target);
                memset(target, (int)i, size / 2);
            }
            sum = bench_mix(sum, (uint8_t)to[size - 1] + ((uint64_t)(uint8_t)to[3] << 8));
        }
    }
    return sum;
}

BENCH("memcpy", prepare, work)
