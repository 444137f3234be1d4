/* Floating point: 96 x 96 matrix product in doubles (the compiler's SSE2 vectors); one unit is one product. */
#include "bench.h"

enum { SIDE = 96 };
static double a[SIDE][SIDE], b[SIDE][SIDE], c[SIDE][SIDE];

static void prepare(const char *variant) {
    (void)variant;
    for (int i = 0; i < SIDE; i++)
        for (int j = 0; j < SIDE; j++) {
            a[i][j] = 1.0 / (1 + i + j);
            b[i][j] = (i - j) * 0.125;
        }
}

__attribute__((optimize("O3"))) static void product(void) {
    memset(c, 0, sizeof c);
    for (int i = 0; i < SIDE; i++)
        for (int k = 0; k < SIDE; k++)
            for (int j = 0; j < SIDE; j++)
                c[i][j] += a[i][k] * b[k][j];
}

static uint64_t work(uint64_t units, const char *variant) {
    (void)variant;
    uint64_t sum = 0;
    while (units--) {
        product();
        a[units % SIDE][3] += c[5][7] * 1e-6;
        sum = bench_mix(sum, bench_double(c[units % SIDE][11]));
    }
    return sum;
}

BENCH("matmul", prepare, work)
