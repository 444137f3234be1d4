/* Integer: carries and wide multiplication. One unit is 300! and its residues. */
#include "bench.h"

/* What the processor multiplies in one step. */
#ifdef __x86_64__
typedef uint64_t limb;
typedef unsigned __int128 product;
#else
typedef uint32_t limb;
typedef uint64_t product;
#endif

enum { LIMBS = 64, LIMB_BITS = 8 * sizeof(limb), HALVES = sizeof(limb) / 4 };

static limb multiply(limb *limbs, limb factor) {
    product carry = 0;
    for (int i = 0; i < LIMBS; i++) {
        carry += (product)limbs[i] * factor;
        limbs[i] = (limb)carry;
        carry >>= LIMB_BITS;
    }
    return (limb)carry;
}

static uint64_t residue(const limb *limbs, uint64_t modulus) {
    uint64_t rest = 0;
    for (int i = LIMBS * HALVES - 1; i >= 0; i--) {
        uint64_t half = (limbs[i / HALVES] >> (i % HALVES * 32)) & 0xffffffff;
        rest = (rest << 32 | half) % modulus;
    }
    return rest;
}

static uint64_t work(uint64_t units, const char *variant) {
    (void)variant;
    uint64_t sum = 0;
    while (units--) {
        limb limbs[LIMBS] = {1};
        for (limb n = 2; n <= 300; n++)
            multiply(limbs, n);
        for (uint64_t m = 1009; m < 1100; m += 6)
            sum = bench_mix(sum, residue(limbs, m * 1000003 & 0xffffffff));
        sum = bench_mix(sum, limbs[20]);
    }
    return sum;
}

BENCH("bignum", bench_nothing, work)
