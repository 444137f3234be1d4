/* Floating point: five bodies under gravity, scalar SSE2 doubles; one unit is 1000 steps. */
#include "bench.h"
#include <math.h>

enum { BODIES = 5 };
struct body {
    double position[3], velocity[3], mass;
};
static struct body bodies[BODIES];

static void prepare(const char *variant) {
    (void)variant;
    for (int i = 0; i < BODIES; i++) {
        bodies[i] = (struct body){{i * 5.0 + 0.5, i * i - 3.0, i * 0.25}, {0.1 * i, 0.3 - 0.07 * i, 0.01 * i}, 1.0 / (1 + i * 9)};
    }
}

static void attract(struct body *a, struct body *b, double dt) {
    double d[3], square = 0;
    for (int i = 0; i < 3; i++) {
        d[i] = a->position[i] - b->position[i];
        square += d[i] * d[i];
    }
    double magnitude = dt / (square * sqrt(square));
    for (int i = 0; i < 3; i++) {
        a->velocity[i] -= d[i] * b->mass * magnitude;
        b->velocity[i] += d[i] * a->mass * magnitude;
    }
}

static void step(double dt) {
    for (int i = 0; i < BODIES; i++)
        for (int j = i + 1; j < BODIES; j++)
            attract(&bodies[i], &bodies[j], dt);
    for (int i = 0; i < BODIES; i++)
        for (int j = 0; j < 3; j++)
            bodies[i].position[j] += dt * bodies[i].velocity[j];
}

static uint64_t work(uint64_t units, const char *variant) {
    (void)variant;
    for (uint64_t i = 0; i < units * 1000; i++)
        step(0.001);
    uint64_t sum = 0;
    for (int i = 0; i < BODIES; i++)
        sum = bench_mix(sum, bench_double(bodies[i].position[0] + bodies[i].velocity[1]));
    return sum;
}

BENCH("nbody", prepare, work)
