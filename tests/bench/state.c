/* Integer: a switch-driven lexer runs over 64 KiB of program-like text per unit. */
#include "bench.h"

enum { SIZE = 65536 };
enum state { START, WORD, NUMBER, STRING, ESCAPE, SLASH, COMMENT };
static char text[SIZE];

static void prepare(const char *variant) {
    (void)variant;
    static const char *const pieces[] = {"while (x) ", "\"a \\\" b\" ", "// note\n", "count_2 = 0x3f;", "\n\t", "12345 + ", "a/b "};
    uint64_t seed = 4;
    for (size_t n = 0; n < SIZE;) {
        const char *piece = pieces[bench_random(&seed) % 7];
        for (; *piece && n < SIZE; piece++)
            text[n++] = *piece;
    }
}

static enum state classify(char c) {
    if ((c >= 'a' && c <= 'z') || c == '_')
        return WORD;
    if (c >= '0' && c <= '9')
        return NUMBER;
    return c == '"' ? STRING : c == '/' ? SLASH : START;
}

static uint64_t work(uint64_t units, const char *variant) {
    (void)variant;
    uint64_t seen[7] = {0};
    enum state state = START;
    while (units--) {
        for (int i = 0; i < SIZE; i++) {
            char c = text[i];
            switch (state) {
            case START:
                state = classify(c);
                break;
            case WORD:
                if (classify(c) != WORD && classify(c) != NUMBER)
                    state = classify(c);
                break;
            case NUMBER:
                if (classify(c) != NUMBER && c != 'x')
                    state = classify(c);
                break;
            case STRING:
                state = c == '"' ? START : c == '\\' ? ESCAPE : STRING;
                break;
            case ESCAPE:
                state = STRING;
                break;
            case SLASH:
                state = c == '/' ? COMMENT : classify(c);
                break;
            case COMMENT:
                if (c == '\n')
                    state = START;
                break;
            }
            seen[state]++;
        }
    }
    uint64_t sum = 0;
    for (int i = 0; i < 7; i++)
        sum = bench_mix(sum, seen[i]);
    return sum;
}

BENCH("state", prepare, work)
