/* Floating point: conversions between integers, floats and doubles, with comparisons; one unit is 2000 values. */
#include "bench.h"

static uint64_t work(uint64_t units, const char *variant) {
    (void)variant;
    uint64_t seed = 8, sum = 0;
    int64_t total = 0;
    for (uint64_t i = 0; i < units * 2000; i++) {
        int64_t whole = (int64_t)bench_random(&seed) >> 20;
        double wide = (double)whole * 0.37;
        float narrow = (float)wide;
        int32_t back = (int32_t)(narrow * 1e-6f);
        total += (int64_t)wide + back + (wide > (double)narrow) + (int32_t)(double)(float)(int32_t)whole;
    }
    return bench_mix(sum, (uint64_t)total);
}

BENCH("convert", bench_nothing, work)
