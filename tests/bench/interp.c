/* Integer: a threaded bytecode interpreter (computed goto); one unit is a loop of 10000 rounds. */
#include "bench.h"

enum op { PUSH, ADD, MUL, XOR, LOAD, STORE, DECREMENT, JUMP_NOT_ZERO, STOP };

/* sum = (sum * 31 + i) ^ 0x55, for i counting down */
static const uint8_t program[] = {LOAD, 0,   PUSH, 31,  MUL, LOAD,      1, ADD,           PUSH, 0x55,
                                  XOR,  STORE, 0,  DECREMENT, 1, JUMP_NOT_ZERO, 0,    STOP};

static uint64_t run(uint64_t rounds) {
    static const void *const labels[] = {&&push, &&add, &&mul, &&xor, &&load, &&store, &&decrement, &&jump, &&stop};
    uint64_t stack[16], *top = stack, slots[2] = {0, rounds};
    const uint8_t *pc = program;
#define NEXT goto *labels[*pc++]
    NEXT;
push:
    *top++ = *pc++;
    NEXT;
add:
    top--;
    top[-1] += *top;
    NEXT;
mul:
    top--;
    top[-1] *= *top;
    NEXT;
xor:
    top--;
    top[-1] ^= *top;
    NEXT;
load:
    *top++ = slots[*pc++];
    NEXT;
store:
    slots[*pc++] = *--top;
    NEXT;
decrement:
    slots[*pc++]--;
    NEXT;
jump:
    pc = slots[1] ? program + *pc : pc + 1;
    NEXT;
stop:
    return slots[0];
}

static uint64_t work(uint64_t units, const char *variant) {
    (void)variant;
    uint64_t sum = 0;
    while (units--)
        sum = bench_mix(sum, run(10000));
    return sum;
}

BENCH("interp", bench_nothing, work)
