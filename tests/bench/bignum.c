/* Integer: carries and wide multiplication. One unit is 300! and its residues. */
#include "bench.h"

enum { LIMBS = 64 };

static uint64_t multiply(uint64_t *limbs, uint64_t factor) {
    unsigned __int128 carry = 0;
    for (int i = 0; i < LIMBS; i++) {
        carry += (unsigned __int128)limbs[i] * factor;
        limbs[i] = (uint64_t)carry;
        carry >>= 64;
    }
    return (uint64_t)carry;
}

static uint64_t residue(const uint64_t *limbs, uint64_t modulus) {
    uint64_t rest = 0;
    for (int i = LIMBS * 2 - 1; i >= 0; i--) {
        uint64_t half = (limbs[i / 2] >> (i % 2 * 32)) & 0xffffffff;
        rest = (rest << 32 | half) % modulus;
    }
    return rest;
}

static uint64_t work(uint64_t units, const char *variant) {
    (void)variant;
    uint64_t sum = 0;
    while (units--) {
        uint64_t limbs[LIMBS] = {1};
        for (uint64_t n = 2; n <= 300; n++)
            multiply(limbs, n);
        for (uint64_t m = 1009; m < 1100; m += 6)
            sum = bench_mix(sum, residue(limbs, m * 1000003 & 0xffffffff));
        sum = bench_mix(sum, limbs[20]);
    }
    return sum;
}

BENCH("bignum", bench_nothing, work)
