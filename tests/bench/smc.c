/* Code that changes: one unit is one change and one run.
 * Variants: patch (an instruction of a function that then runs), crowd (the same, on a page with 63 functions more, of
 * which one runs too), data (a counter beside code on its page). */
#include "bench.h"
#include <sys/mman.h>

enum { PAGE = 4096, FUNCTION = 64, FUNCTIONS = PAGE / FUNCTION };

typedef uint32_t (*function)(uint32_t);

static uint8_t *page;

/* mov ecx, argument; add ecx, immediate; three more; mov eax, ecx; ret. The patch is of the immediate. */
#ifdef __x86_64__
static const uint8_t code[] = {0x89, 0xf9, 0x81, 0xc1, 1, 0, 0, 0, 0x69, 0xc9, 3, 0, 0, 0, 0xc1, 0xc1, 5, 0xf7, 0xd1, 0x89, 0xc8, 0xc3};
enum { IMMEDIATE = 4 };
#else
static const uint8_t code[] = {0x8b, 0x4c, 0x24, 4, 0x81, 0xc1, 1, 0, 0, 0, 0x69, 0xc9, 3, 0, 0, 0, 0xc1, 0xc1, 5, 0xf7, 0xd1, 0x89, 0xc8, 0xc3};
enum { IMMEDIATE = 6 };
#endif

static uint32_t run(unsigned n, uint32_t x) {
    function f;
    uint8_t *at = page + n * FUNCTION;
    memcpy(&f, &at, sizeof f);
    return f(x);
}

static void prepare(const char *variant) {
    (void)variant;
    page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED)
        bench_die("mmap");
    for (unsigned n = 0; n < FUNCTIONS; n++) {
        memcpy(page + n * FUNCTION, code, sizeof code);
        run(n, n);
    }
}

static void store(unsigned at, uint32_t value) { *(volatile uint32_t *)(page + at) = value; }

static uint64_t work(uint64_t units, const char *variant) {
    uint32_t x = 1;
    for (uint64_t i = 0; i < units; i++) {
        unsigned n = *variant == 'c' ? i % FUNCTIONS : 0;
        if (*variant == 'd')
            store(PAGE - 4, (uint32_t)i);
        else
            store(n * FUNCTION + IMMEDIATE, (uint32_t)i);
        x = run(n, x);
        if (*variant == 'c')
            x = run((n + 7) % FUNCTIONS, x);
    }
    return x;
}

BENCH("smc", prepare, work)
