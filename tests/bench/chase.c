/* Memory: dependent loads. Variants l1 (16 KiB), l2 (512 KiB), dram (64 MiB); one unit is 1000 steps. */
#include "bench.h"

struct node {
    struct node *next;
    char pad[56];
};
static struct node *first;

/* A single random cycle (Sattolo), so that no prefetcher can guess it. */
static void prepare(const char *variant) {
    size_t bytes = !strcmp(variant, "l1") ? 16 << 10 : !strcmp(variant, "l2") ? 512 << 10 : 64 << 20;
    size_t count = bytes / sizeof(struct node);
    struct node *nodes = calloc(count, sizeof *nodes);
    uint32_t *order = malloc(count * sizeof *order);
    uint64_t seed = 7;
    if (!nodes || !order)
        bench_die("calloc");
    for (size_t i = 0; i < count; i++)
        order[i] = (uint32_t)i;
    for (size_t i = count - 1; i > 0; i--) {
        size_t j = bench_random(&seed) % i;
        uint32_t t = order[i];
        order[i] = order[j];
        order[j] = t;
    }
    for (size_t i = 0; i < count; i++) {
        nodes[order[i]].next = &nodes[order[(i + 1) % count]];
        nodes[order[i]].pad[0] = (char)i;
    }
    free(order);
    first = nodes;
}

static uint64_t work(uint64_t units, const char *variant) {
    (void)variant;
    struct node *node = first;
    for (uint64_t i = 0; i < units * 1000; i++)
        node = node->next;
    return (uint64_t)((char *)node - (char *)first) ^ (uint8_t)node->pad[0];
}

BENCH("chase", prepare, work)
