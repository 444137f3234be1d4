/* Floating point: 80-bit long double on the x87 stack; one unit is 2000 rounds of a continued fraction and a root. */
#include "bench.h"
#include <math.h>

static uint64_t work(uint64_t units, const char *variant) {
    (void)variant;
    long double x = 1.5L, sum = 0;
    for (uint64_t i = 0; i < units * 2000; i++) {
        x = 1.0L + 1.0L / (x + (long double)(i & 7));
        sum += sqrtl(x) * 0.5L - x / 3.0L;
        if (sum > 1000.0L)
            sum -= 1000.0L;
    }
    unsigned char bytes[16] = {0};
    memcpy(bytes, &sum, 10);
    uint64_t mixed = 0;
    for (int i = 0; i < 10; i++)
        mixed = bench_mix(mixed, bytes[i]);
    return mixed;
}

BENCH("x87", bench_nothing, work)
