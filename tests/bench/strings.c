/* Integer: the C library's string functions over 64 KiB of words per unit. */
#include "bench.h"

enum { SIZE = 65536 };
static char text[SIZE + 1], copy[SIZE + 1];

static void prepare(const char *variant) {
    (void)variant;
    uint64_t seed = 5;
    for (int i = 0; i < SIZE; i++) {
        uint64_t r = bench_random(&seed);
        text[i] = r % 7 == 0 ? ' ' : (char)('a' + (r >> 8) % 26);
    }
}

static uint64_t work(uint64_t units, const char *variant) {
    (void)variant;
    uint64_t sum = 0;
    while (units--) {
        strcpy(copy, text);
        char *rest = NULL;
        for (char *word = strtok_r(copy, " ", &rest); word; word = strtok_r(NULL, " ", &rest)) {
            sum += strlen(word) + (uint64_t)(strchr(word, 'q') != NULL) + (uint64_t)(strcmp(word, "mmm") < 0);
        }
        const char *found = strstr(text, "zebra");
        sum = bench_mix(sum, found ? (uint64_t)(found - text) : 0);
        sum += (uint64_t)(memchr(text, '!', SIZE) == NULL) + (uint64_t)(memcmp(text, copy, SIZE) != 0);
    }
    return sum;
}

BENCH("strings", prepare, work)
