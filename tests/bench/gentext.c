/* Writes BYTES of made-up, compressible text to standard output: the input of the real programs. */
#include "bench.h"

int main(int argc, char **argv) {
    uint64_t size = argc > 1 ? strtoull(argv[1], NULL, 0) : 1 << 20, written = 0, seed = 9;
    for (unsigned line = 1; written < size; line++) {
        int length = printf("%u", line);
        uint64_t words = 3 + bench_random(&seed) % 9;
        while (words--) {
            uint64_t r = bench_random(&seed);
            unsigned word = (unsigned)(r % (1 + (r >> 32) % 3000));
            length += printf(" %c%c%x", 'a' + (int)(word % 26), 'a' + (int)(word / 26 % 26), word * 2654435761u >> 20);
        }
        length += printf("\n");
        written += (uint64_t)length;
    }
    return 0;
}
