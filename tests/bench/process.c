/* Kernel: processes. Variants fork (fork, exit, wait), exec (fork, exec of this program, wait); one unit is one process. */
#include "bench.h"
#include <sys/wait.h>

static uint64_t spawn(int exec) {
    pid_t child = fork();
    if (child < 0)
        bench_die("fork");
    if (child == 0) {
        if (!exec)
            _exit(42);
        execl("/proc/self/exe", "process", "--child", (char *)NULL);
        _exit(1);
    }
    int status = 0;
    if (waitpid(child, &status, 0) != child)
        bench_die("waitpid");
    return (uint64_t)WEXITSTATUS(status);
}

static uint64_t work(uint64_t units, const char *variant) {
    uint64_t sum = 0;
    while (units--)
        sum += spawn(*variant == 'e');
    return sum;
}

int main(int argc, char **argv) {
    if (argc == 2 && !strcmp(argv[1], "--child"))
        return 42;
    return bench_main(argc, argv, "process", bench_nothing, work);
}
