/* Memory: a[i] = b[i] + 3 * c[i] over 24 MiB; one unit is one pass. */
#include "bench.h"

enum { COUNT = 1 << 20 };
static uint64_t a[COUNT], b[COUNT], c[COUNT];

static void prepare(const char *variant) {
    (void)variant;
    for (uint64_t i = 0; i < COUNT; i++) {
        a[i] = 0;
        b[i] = i * 5;
        c[i] = ~i;
    }
}

static uint64_t work(uint64_t units, const char *variant) {
    (void)variant;
    for (uint64_t pass = 0; pass < units; pass++) {
        for (int i = 0; i < COUNT; i++)
            a[i] = b[i] + 3 * c[i];
        BENCH_OPAQUE(pass);
        b[pass % COUNT] += a[(pass * 7) % COUNT];
    }
    return bench_mix(a[12345], a[COUNT - 1]);
}

BENCH("stream", prepare, work)
