/* Disk benchmark inside a Linux guest: `diskbench DEVICE [MEGABYTES [OPERATIONS [SEED]]]`.
 *
 * Fills the first MEGABYTES of the device with a pattern that names each sector, then measures, all with O_DIRECT:
 * sequential write and read in 128 KiB pieces, random 4 KiB reads and writes at depth 1 (pread, pwrite) and
 * depth 32 (Linux AIO by raw system calls). Afterwards it reads everything back and compares every byte.
 * Each test is one line of key=value pairs between the marks of bench.h:
 *     @@begin sda/randread/1
 *     diskbench device=sda test=randread depth=1 block=4096 operations=2000 bytes=8192000 micros=130712
 *     @@end sda/randread/1 2000 0 CPU_NANOSECONDS
 * and the last line is `diskbench device=sda verified=BYTES mismatches=SECTORS`. Exit status 0 means no mismatch. */
#include "bench.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <time.h>

enum { SECTOR = 512, PIECE = 128 << 10, BLOCK = 4096, DEPTH = 32, WORDS = SECTOR / 8 };
#define BLKGETSIZE64_REQUEST _IOR(0x12, 114, size_t)

struct disk {
    const char *label;
    int fd;
    uint64_t bytes; /* the part in use */
    uint64_t seed;
    uint8_t *buffer; /* DEPTH blocks or one piece */
};

static void fill_sectors(uint8_t *buffer, uint64_t sector, size_t bytes, uint64_t seed) {
    uint64_t *words = (uint64_t *)buffer;
    for (size_t i = 0; i < bytes / 8; i++)
        words[i] = (sector + i / WORDS) * 0x9e3779b97f4a7c15ull + seed + i % WORDS;
}

static uint64_t wrong_sectors(const uint8_t *buffer, uint64_t sector, size_t bytes, uint64_t seed) {
    static uint8_t expected[SECTOR] __attribute__((aligned(8)));
    uint64_t wrong = 0;
    for (size_t at = 0; at < bytes; at += SECTOR) {
        fill_sectors(expected, sector + at / SECTOR, SECTOR, seed);
        wrong += memcmp(expected, buffer + at, SECTOR) != 0;
    }
    return wrong;
}

static uint64_t micros(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

static void transfer(struct disk *disk, int writing, uint8_t *data, size_t bytes, uint64_t at) {
    ssize_t done = writing ? pwrite(disk->fd, data, bytes, (off_t)at) : pread(disk->fd, data, bytes, (off_t)at);
    if (done != (ssize_t)bytes) {
        fprintf(stderr, "diskbench: %s of %zu bytes at %llu: %s\n", writing ? "write" : "read", bytes,
                (unsigned long long)at, done < 0 ? strerror(errno) : "short");
        exit(1);
    }
}

static uint64_t sequential(struct disk *disk, int writing) {
    uint64_t operations = 0;
    for (uint64_t at = 0; at < disk->bytes; at += PIECE, operations++) {
        if (writing)
            fill_sectors(disk->buffer, at / SECTOR, PIECE, disk->seed);
        transfer(disk, writing, disk->buffer, PIECE, at);
    }
    return operations;
}

static uint64_t random_block(struct disk *disk, uint64_t *state) {
    return bench_random(state) % (disk->bytes / BLOCK) * BLOCK;
}

static uint64_t random_one(struct disk *disk, int writing, uint64_t operations) {
    uint64_t state = disk->seed;
    for (uint64_t i = 0; i < operations; i++) {
        uint64_t at = random_block(disk, &state);
        if (writing)
            fill_sectors(disk->buffer, at / SECTOR, BLOCK, disk->seed);
        transfer(disk, writing, disk->buffer, BLOCK, at);
    }
    return operations;
}

static void submit(struct disk *disk, aio_context_t context, struct iocb *request, int writing, uint64_t at) {
    uint8_t *data = (uint8_t *)(uintptr_t)request->aio_buf;
    if (writing)
        fill_sectors(data, at / SECTOR, BLOCK, disk->seed);
    request->aio_lio_opcode = writing ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
    request->aio_fildes = (uint32_t)disk->fd;
    request->aio_nbytes = BLOCK;
    request->aio_offset = (int64_t)at;
    request->aio_data = (uint64_t)(uintptr_t)request;
    if (syscall(SYS_io_submit, context, 1L, &request) != 1)
        bench_die("io_submit");
}

static uint64_t random_deep(struct disk *disk, int writing, uint64_t operations) {
    aio_context_t context = 0;
    struct iocb requests[DEPTH] = {0};
    struct io_event events[DEPTH];
    uint64_t state = disk->seed + 1, submitted = 0, finished = 0;
    if (syscall(SYS_io_setup, (long)DEPTH, &context))
        bench_die("io_setup");
    for (; submitted < DEPTH && submitted < operations; submitted++) {
        requests[submitted].aio_buf = (uint64_t)(uintptr_t)(disk->buffer + submitted * BLOCK);
        submit(disk, context, &requests[submitted], writing, random_block(disk, &state));
    }
    while (finished < submitted) {
        long got = syscall(SYS_io_getevents, context, 1L, (long)DEPTH, events, NULL);
        if (got < 1)
            bench_die("io_getevents");
        for (long i = 0; i < got; i++, finished++) {
            if (events[i].res != BLOCK) {
                fprintf(stderr, "diskbench: asynchronous transfer returned %lld\n", (long long)events[i].res);
                exit(1);
            }
            if (submitted < operations) {
                submit(disk, context, (struct iocb *)(uintptr_t)events[i].data, writing, random_block(disk, &state));
                submitted++;
            }
        }
    }
    syscall(SYS_io_destroy, context);
    return finished;
}

static void measure(struct disk *disk, const char *test, int writing, uint64_t depth, uint64_t operations) {
    char name[96];
    snprintf(name, sizeof name, "%s/%s/%llu", disk->label, test, (unsigned long long)depth);
    bench_begin(name);
    uint64_t cpu = bench_cpu_ns(), start = micros(), block = operations ? BLOCK : PIECE, done;
    if (!operations)
        done = sequential(disk, writing);
    else
        done = depth == 1 ? random_one(disk, writing, operations) : random_deep(disk, writing, operations);
    if (writing && fsync(disk->fd))
        bench_die("fsync");
    uint64_t taken = micros() - start;
    cpu = bench_cpu_ns() - cpu;
    printf("diskbench device=%s test=%s depth=%llu block=%llu operations=%llu bytes=%llu micros=%llu\n", disk->label, test,
           (unsigned long long)depth, (unsigned long long)block, (unsigned long long)done,
           (unsigned long long)(done * block), (unsigned long long)taken);
    fflush(stdout);
    bench_end(name, done, 0, cpu);
}

static uint64_t verify(struct disk *disk) {
    uint64_t wrong = 0;
    for (uint64_t at = 0; at < disk->bytes; at += PIECE) {
        transfer(disk, 0, disk->buffer, PIECE, at);
        wrong += wrong_sectors(disk->buffer, at / SECTOR, PIECE, disk->seed);
    }
    printf("diskbench device=%s verified=%llu mismatches=%llu\n", disk->label, (unsigned long long)disk->bytes,
           (unsigned long long)wrong);
    fflush(stdout);
    return wrong;
}

static struct disk open_disk(const char *path, uint64_t megabytes, uint64_t seed) {
    const char *slash = strrchr(path, '/');
    struct disk disk = {.label = slash ? slash + 1 : path, .bytes = megabytes << 20, .seed = seed};
    uint64_t size = 0;
    disk.fd = open(path, O_RDWR | O_DIRECT | O_CLOEXEC);
    if (disk.fd < 0)
        bench_die(path);
    if (ioctl(disk.fd, BLKGETSIZE64_REQUEST, &size) == 0 && size < disk.bytes)
        disk.bytes = size / PIECE * PIECE;
    if (posix_memalign((void **)&disk.buffer, BLOCK, PIECE) || disk.bytes == 0) {
        fprintf(stderr, "diskbench: %s is smaller than %d bytes\n", path, PIECE);
        exit(1);
    }
    return disk;
}

int main(int argc, char **argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: diskbench DEVICE [MEGABYTES [OPERATIONS [SEED]]]\n");
        return 2;
    }
    uint64_t megabytes = argc > 2 ? strtoull(argv[2], NULL, 0) : 32;
    uint64_t operations = argc > 3 ? strtoull(argv[3], NULL, 0) : 2000;
    struct disk disk = open_disk(argv[1], megabytes ? megabytes : 1, argc > 4 ? strtoull(argv[4], NULL, 0) : 1);
    measure(&disk, "seqwrite", 1, 1, 0);
    measure(&disk, "seqread", 0, 1, 0);
    measure(&disk, "randread", 0, 1, operations ? operations : 1);
    measure(&disk, "randwrite", 1, 1, operations ? operations : 1);
    measure(&disk, "randread", 0, DEPTH, operations ? operations : 1);
    measure(&disk, "randwrite", 1, DEPTH, operations ? operations : 1);
    return verify(&disk) != 0;
}
