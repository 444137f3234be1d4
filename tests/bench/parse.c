/* Integer: a recursive-descent parser evaluates 64 KiB of arithmetic text per unit. */
#include "bench.h"

enum { SIZE = 65536 };
static char text[SIZE + 64];
static const char *at;

static void prepare(const char *variant) {
    (void)variant;
    static const char operators[] = "+-*+-+";
    uint64_t seed = 2;
    size_t n = 0, depth = 0;
    while (n < SIZE) {
        while (depth < 20 && bench_random(&seed) % 4 == 0) {
            text[n++] = '(';
            depth++;
        }
        n += (size_t)sprintf(text + n, "%u", (unsigned)(bench_random(&seed) % 100000));
        while (depth > 0 && bench_random(&seed) % 3 == 0) {
            text[n++] = ')';
            depth--;
        }
        text[n++] = operators[bench_random(&seed) % 6];
    }
    text[n++] = '7';
    while (depth--)
        text[n++] = ')';
    text[n] = 0;
}

static uint64_t expression(void);

static uint64_t atom(void) {
    if (*at == '(') {
        at++;
        uint64_t value = expression();
        at++;
        return value;
    }
    uint64_t value = 0;
    while (*at >= '0' && *at <= '9')
        value = value * 10 + (uint64_t)(*at++ - '0');
    return value;
}

static uint64_t term(void) {
    uint64_t value = atom();
    while (*at == '*') {
        at++;
        value *= atom();
    }
    return value;
}

static uint64_t expression(void) {
    uint64_t value = term();
    while (*at == '+' || *at == '-') {
        char operator= * at++;
        uint64_t right = term();
        value = operator== '+' ? value + right : value - right;
    }
    return value;
}

static uint64_t work(uint64_t units, const char *variant) {
    (void)variant;
    uint64_t sum = 0;
    while (units--) {
        at = text;
        sum = bench_mix(sum, expression());
    }
    return sum;
}

BENCH("parse", prepare, work)
