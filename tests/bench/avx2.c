/* Floating point: a fused multiply-add kernel and integer lanes in 256-bit registers; one unit is 64 KiB.
 * Skipped where CPUID offers no AVX2 and FMA. */
#include "bench.h"
#include <immintrin.h>

enum { COUNT = 8192 };
static float x[COUNT] __attribute__((aligned(32))), y[COUNT] __attribute__((aligned(32)));

static void prepare(const char *variant) {
    (void)variant;
    for (int i = 0; i < COUNT; i++) {
        x[i] = (float)(i % 101) * 0.01f;
        y[i] = 1.0f;
    }
}

__attribute__((target("avx2,fma"))) static uint64_t kernel(float factor) {
    __m256 f = _mm256_set1_ps(factor);
    __m256i sum = _mm256_setzero_si256();
    for (int i = 0; i < COUNT; i += 8) {
        __m256 value = _mm256_fmadd_ps(_mm256_load_ps(x + i), f, _mm256_mul_ps(_mm256_load_ps(y + i), _mm256_set1_ps(0.5f)));
        _mm256_store_ps(y + i, value);
        __m256i lanes = _mm256_cvttps_epi32(_mm256_mul_ps(value, _mm256_set1_ps(1000.0f)));
        sum = _mm256_add_epi32(_mm256_permutevar8x32_epi32(sum, _mm256_set_epi32(0, 7, 6, 5, 4, 3, 2, 1)), lanes);
    }
    uint32_t out[8];
    _mm256_storeu_si256((__m256i *)out, sum);
    uint64_t mixed = 0;
    for (int i = 0; i < 8; i++)
        mixed = bench_mix(mixed, out[i]);
    return mixed;
}

static uint64_t work(uint64_t units, const char *variant) {
    (void)variant;
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
        return BENCH_SKIPPED;
    uint64_t sum = 0;
    while (units--)
        sum = bench_mix(sum, kernel((float)(units % 7) * 0.1f));
    return sum;
}

BENCH("avx2", prepare, work)
