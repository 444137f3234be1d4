/* Integer: quicksort of 16 Ki random words per unit. */
#include "bench.h"

enum { COUNT = 16384 };
static uint32_t values[COUNT];

static void swap(uint32_t *a, uint32_t *b) {
    uint32_t t = *a;
    *a = *b;
    *b = t;
}

static void quicksort(uint32_t *low, uint32_t *high) {
    while (low < high) {
        uint32_t pivot = low[(high - low) / 2], *i = low, *j = high;
        while (i <= j) {
            while (*i < pivot)
                i++;
            while (*j > pivot)
                j--;
            if (i <= j)
                swap(i++, j--);
        }
        if (j - low < high - i) {
            quicksort(low, j);
            low = i;
        } else {
            quicksort(i, high);
            high = j;
        }
    }
}

static uint64_t work(uint64_t units, const char *variant) {
    (void)variant;
    uint64_t seed = 1, sum = 0;
    while (units--) {
        for (int i = 0; i < COUNT; i++)
            values[i] = (uint32_t)bench_random(&seed);
        quicksort(values, values + COUNT - 1);
        for (int i = 0; i < COUNT; i += 97)
            sum = bench_mix(sum, values[i]);
    }
    return sum;
}

BENCH("sort", bench_nothing, work)
