/* Integer: 16 Ki inserts and lookups in an open-addressing table of short string keys per unit. */
#include "bench.h"

enum { SLOTS = 32768, KEYS = 16384 };
struct slot {
    char key[12];
    uint32_t count;
};
static struct slot table[SLOTS];
static char keys[KEYS][12];

static void prepare(const char *variant) {
    (void)variant;
    uint64_t seed = 3;
    for (int i = 0; i < KEYS; i++)
        snprintf(keys[i], sizeof keys[i], "k%x", (unsigned)(bench_random(&seed) & 0xfffff));
}

static uint32_t fnv(const char *text) {
    uint32_t h = 2166136261u;
    while (*text)
        h = (h ^ (uint8_t)*text++) * 16777619u;
    return h;
}

static struct slot *find(const char *key) {
    uint32_t i = fnv(key) % SLOTS;
    while (table[i].key[0] && strcmp(table[i].key, key) != 0)
        i = (i + 1) % SLOTS;
    return &table[i];
}

static uint64_t work(uint64_t units, const char *variant) {
    (void)variant;
    uint64_t sum = 0;
    while (units--) {
        memset(table, 0, sizeof table);
        for (int i = 0; i < KEYS; i++) {
            struct slot *slot = find(keys[i]);
            if (!slot->key[0])
                strcpy(slot->key, keys[i]);
            slot->count++;
        }
        for (int i = 0; i < KEYS; i++)
            sum = bench_mix(sum, find(keys[(i * 7919) % KEYS])->count);
    }
    return sum;
}

BENCH("hash", prepare, work)
