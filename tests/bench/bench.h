/* One harness for every program of the benchmark suite.
 *
 * `prog UNITS [VARIANT]` does UNITS units of work and prints
 *     @@begin NAME
 *     @@end NAME UNITS RESULT CPU_NANOSECONDS
 * The first mark is written after the preparation, each mark is drained to the console before
 * the program goes on, so that a runner outside the guest can read the emulator's CPU time
 * at the marks. RESULT must be the same on every machine. CPU time is what the program
 * itself saw (with its children): a runner uses it only for native runs. */
#ifndef PV_BENCH_H
#define PV_BENCH_H

#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/types.h>
#include <termios.h>
#include <unistd.h>

/* What a program prints instead of a result when the processor lacks what it measures. */
#define BENCH_SKIPPED UINT64_MAX

typedef void (*bench_prepare)(const char *variant);
typedef uint64_t (*bench_work)(uint64_t units, const char *variant);

static inline void bench_nothing(const char *variant) { (void)variant; }

__attribute__((noreturn)) static inline void bench_die(const char *what) {
    perror(what);
    exit(1);
}

static inline uint64_t bench_cpu_ns(void) {
    struct rusage own, children;
    getrusage(RUSAGE_SELF, &own);
    getrusage(RUSAGE_CHILDREN, &children);
    uint64_t seconds = own.ru_utime.tv_sec + own.ru_stime.tv_sec + children.ru_utime.tv_sec + children.ru_stime.tv_sec;
    uint64_t micros = own.ru_utime.tv_usec + own.ru_stime.tv_usec + children.ru_utime.tv_usec + children.ru_stime.tv_usec;
    return seconds * 1000000000ull + micros * 1000ull;
}

static inline void bench_mark(const char *line) {
    size_t length = strlen(line);
    if (write(1, line, length) != (ssize_t)length)
        bench_die("mark");
    tcdrain(1); /* fails on a pipe, where nothing needs draining */
}

static inline void bench_begin(const char *name) {
    char line[128];
    snprintf(line, sizeof line, "@@begin %s\n", name);
    bench_mark(line);
}

static inline void bench_end(const char *name, uint64_t units, uint64_t result, uint64_t cpu_ns) {
    char line[192], text[24] = "skipped";
    if (result != BENCH_SKIPPED)
        snprintf(text, sizeof text, "%016llx", (unsigned long long)result);
    snprintf(line, sizeof line, "@@end %s %llu %s %llu\n", name, (unsigned long long)units, text,
             (unsigned long long)cpu_ns);
    bench_mark(line);
}

static inline int bench_main(int argc, char **argv, const char *program, bench_prepare prepare, bench_work work) {
    char name[64];
    const char *variant = argc > 2 ? argv[2] : "";
    uint64_t units = argc > 1 ? strtoull(argv[1], NULL, 0) : 1;
    snprintf(name, sizeof name, "%s%s%s%s", program, *variant ? "-" : "", variant, sizeof(void *) == 4 ? "-32" : "");
    prepare(variant);
    bench_begin(name);
    uint64_t before = bench_cpu_ns();
    uint64_t result = work(units, variant);
    bench_end(name, units, result, bench_cpu_ns() - before);
    return 0;
}

#define BENCH(program, prepare, work)                                                                                  \
    int main(int argc, char **argv) { return bench_main(argc, argv, program, prepare, work); }

/* splitmix64: the one source of made-up data. */
static inline uint64_t bench_random(uint64_t *state) {
    uint64_t z = (*state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

static inline uint64_t bench_mix(uint64_t sum, uint64_t value) { return (sum ^ value) * 0x100000001b3ull; }

static inline uint64_t bench_double(double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* Hides a value from the optimizer. */
#define BENCH_OPAQUE(value) __asm__ volatile("" : "+r"(value) : : "memory")

#endif
