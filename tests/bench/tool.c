/* Real programs: `tool NAME UNITS COMMAND [ARGUMENT]…` runs the command UNITS times between the marks of
 * bench.h; the result is a sum over what the command wrote to its standard output. */
#include "bench.h"
#include <sys/wait.h>

/* Every 61st byte of the stream, wherever the pipe happens to cut it, and its length. */
static uint64_t drain(int from, uint64_t sum) {
    static uint8_t buffer[65536];
    uint64_t length = 0, next = 0;
    ssize_t got;
    while ((got = read(from, buffer, sizeof buffer)) > 0) {
        for (; next < length + (uint64_t)got; next += 61)
            sum = bench_mix(sum, buffer[next - length]);
        length += (uint64_t)got;
    }
    return bench_mix(sum, length);
}

static uint64_t run(char **command, uint64_t sum) {
    int ends[2], status = 0;
    if (pipe(ends))
        bench_die("pipe");
    pid_t child = fork();
    if (child < 0)
        bench_die("fork");
    if (child == 0) {
        dup2(ends[1], 1);
        close(ends[0]);
        close(ends[1]);
        execvp(command[0], command);
        bench_die(command[0]);
    }
    close(ends[1]);
    sum = drain(ends[0], sum);
    close(ends[0]);
    if (waitpid(child, &status, 0) != child || status != 0) {
        fprintf(stderr, "%s failed with status %#x\n", command[0], status);
        exit(1);
    }
    return sum;
}

int main(int argc, char **argv) {
    if (argc < 4) {
        fprintf(stderr, "usage: tool NAME UNITS COMMAND [ARGUMENT]...\n");
        return 2;
    }
    uint64_t units = strtoull(argv[2], NULL, 0), sum = 0;
    bench_begin(argv[1]);
    uint64_t before = bench_cpu_ns();
    for (uint64_t i = 0; i < units; i++)
        sum = run(argv + 3, sum);
    bench_end(argv[1], units, sum, bench_cpu_ns() - before);
    return 0;
}
