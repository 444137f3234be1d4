/* Several processors: independent threads. Variants one, two: so many threads do UNITS units each, and UNITS times as many
 * are counted. What is measured is time, not processor time. */
#include "bench.h"
#include <pthread.h>
#include <time.h>

enum { WORDS = 1024 };

static uint64_t unit(uint64_t seed) {
    uint64_t words[WORDS], sum = 0;
    for (int i = 0; i < WORDS; i++)
        words[i] = bench_random(&seed);
    for (int round = 0; round < 16; round++)
        for (int i = 0; i < WORDS; i++)
            words[i] = (words[i] << 7 | words[i] >> 57) + words[words[i] % WORDS];
    for (int i = 0; i < WORDS; i++)
        sum = bench_mix(sum, words[i]);
    return sum;
}

struct share {
    pthread_t thread;
    uint64_t units, sum;
};

static void *run(void *argument) {
    struct share *share = argument;
    for (uint64_t i = 0; i < share->units; i++)
        share->sum = bench_mix(share->sum, unit(i));
    return NULL;
}

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

int main(int argc, char **argv) {
    uint64_t units = argc > 1 ? strtoull(argv[1], NULL, 0) : 1;
    int two = argc > 2 && strcmp(argv[2], "two") == 0;
    struct share shares[2] = {{.units = units}, {.units = units}};
    const char *name = two ? "threads-two" : "threads-one";
    bench_begin(name);
    uint64_t before = now();
    for (int i = 0; i <= two; i++)
        if (pthread_create(&shares[i].thread, NULL, run, &shares[i]))
            bench_die("pthread_create");
    for (int i = 0; i <= two; i++)
        pthread_join(shares[i].thread, NULL);
    uint64_t after = now();
    if (two && shares[0].sum != shares[1].sum)
        bench_die("sums");
    bench_end(name, units * (two ? 2 : 1), shares[0].sum, after - before);
    return 0;
}
