/* Integer: rotate, xor and add. One unit is the SHA-256 compression (FIPS 180-4) of 256 blocks. */
#include "bench.h"

static uint32_t k[64];

/* Whether x^3 <= n * 2^96, for x < 2^35: x = h * 2^18 + l, so that no step leaves 64 bits. */
static int cube_within(uint64_t x, unsigned n) {
    uint64_t h = x >> 18, l = x & 0x3ffff;
    uint64_t low = l * l * l, third = 3 * h * l * l + (low >> 18);
    uint64_t second = 3 * h * h * l + (third >> 18), first = h * h * h + (second >> 18);
    uint64_t rest = (second & 0x3ffff) | (third & 0x3ffff) | (low & 0x3ffff);
    uint64_t target = (uint64_t)n << 42; /* in units of 2^54 */
    return first < target || (first == target && rest == 0);
}

static uint32_t root_fraction(unsigned prime) {
    /* first 32 bits of the fraction of the cube root, by bisection on integers */
    uint64_t low = 0, high = 8ull << 32;
    while (high - low > 1) {
        uint64_t middle = (low + high) / 2;
        if (cube_within(middle, prime))
            low = middle;
        else
            high = middle;
    }
    return (uint32_t)low;
}

static void prepare(const char *variant) {
    (void)variant;
    unsigned found = 0;
    for (unsigned n = 2; found < 64; n++) {
        unsigned divisor = 2;
        while (n % divisor)
            divisor++;
        if (divisor == n)
            k[found++] = root_fraction(n);
    }
}

static uint32_t rotate(uint32_t x, int by) { return x >> by | x << (32 - by); }

static void compress(uint32_t *h, const uint32_t *block) {
    uint32_t w[64], s[8];
    memcpy(w, block, 64);
    memcpy(s, h, 32);
    for (int i = 16; i < 64; i++) {
        uint32_t a = w[i - 15], b = w[i - 2];
        w[i] = w[i - 16] + w[i - 7] + (rotate(a, 7) ^ rotate(a, 18) ^ a >> 3) + (rotate(b, 17) ^ rotate(b, 19) ^ b >> 10);
    }
    for (int i = 0; i < 64; i++) {
        uint32_t e = rotate(s[4], 6) ^ rotate(s[4], 11) ^ rotate(s[4], 25), choose = (s[4] & s[5]) ^ (~s[4] & s[6]);
        uint32_t a = rotate(s[0], 2) ^ rotate(s[0], 13) ^ rotate(s[0], 22);
        uint32_t majority = (s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]);
        uint32_t first = s[7] + e + choose + k[i] + w[i];
        memmove(s + 1, s, 28);
        s[4] += first;
        s[0] = first + a + majority;
    }
    for (int i = 0; i < 8; i++)
        h[i] += s[i];
}

static uint64_t work(uint64_t units, const char *variant) {
    (void)variant;
    uint32_t h[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    uint32_t block[16] = {0};
    for (uint64_t i = 0; i < units * 256; i++) {
        block[i % 16] += (uint32_t)i;
        compress(h, block);
    }
    return (uint64_t)h[0] << 32 | h[7];
}

BENCH("sha", prepare, work)
