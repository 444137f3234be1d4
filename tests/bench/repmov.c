/* Memory: the string instructions themselves: rep movsb and rep stos of words over 4 KiB, rep movsb over 48 bytes. */
#include "bench.h"

static char from[8192], to[8192];

static void movsb(void *target, const void *source, size_t count) {
    __asm__ volatile("rep movsb" : "+D"(target), "+S"(source), "+c"(count) : : "memory");
}

static void stos(void *target, size_t value, size_t count) {
#ifdef __x86_64__
    __asm__ volatile("rep stosq" : "+D"(target), "+c"(count) : "a"(value) : "memory");
#else
    __asm__ volatile("rep stosl" : "+D"(target), "+c"(count) : "a"(value) : "memory");
#endif
}

static uint64_t work(uint64_t units, const char *variant) {
    (void)variant;
    uint64_t sum = 0;
    for (uint64_t i = 0; i < units; i++) {
        stos(from, (size_t)(i * 0x0101010101010101ull), 4096 / sizeof(size_t));
        movsb(to + i % 64, from, 4096);
        for (int j = 0; j < 8; j++)
            movsb(to + j * 48 + 4096, to + j * 61, 48);
        sum = bench_mix(sum, (uint8_t)to[i % 4096]);
    }
    return sum;
}

BENCH("repmov", bench_nothing, work)
