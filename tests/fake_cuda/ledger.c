/* Which live process holds how much device memory.
 *
 * A table in the file FAKE_CUDA_STATE, shared by all processes that name it (unset: private to this
 * one). A process killed at any point must not spoil it: a slot is valid only while its kind is
 * set, which is written last and cleared first; the lock is flock, which the kernel drops with its
 * holder; slots of dead processes are swept. */
#define _GNU_SOURCE
#include "fake_cuda.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum kind { EMPTY, MAPPING, CONTEXT };

struct slot {
    uint32_t kind;
    int32_t device;
    int64_t pid;
    uint64_t started; /* of the process: a pid may be used again */
    uint64_t allocation;
    uint64_t bytes;
};

#define SLOTS 4096

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct slot private_table[SLOTS];
static struct slot *table;
static int file = -1;

/* The start time of a process, 0 if it is dead; a zombie is dead, its memory is gone. */
static uint64_t start_of(int64_t pid)
{
    char path[64], text[1024];
    snprintf(path, sizeof path, "/proc/%lld/stat", (long long)pid);
    int stat = open(path, O_RDONLY | O_CLOEXEC);
    if (stat < 0)
        return 0;
    ssize_t got = read(stat, text, sizeof text - 1);
    close(stat);
    text[got > 0 ? got : 0] = 0;
    char *field = strrchr(text, ')'); /* a name may itself contain blanks and brackets */
    char state;
    unsigned long long started;
    /* State is field 3, the start time field 22. */
    if (!field || sscanf(field + 1,
                         " %c %*s %*s %*s %*s %*s %*s %*s %*s %*s"
                         " %*s %*s %*s %*s %*s %*s %*s %*s %*s %llu",
                         &state, &started) != 2)
        return 0;
    return state == 'Z' || state == 'X' ? 0 : started + 1; /* never 0 for the living */
}

static void sweep(void)
{
    int64_t seen = 0; /* a process's slots mostly lie together */
    uint64_t started = 0;
    for (int i = 0; i < SLOTS; i++) {
        if (table[i].kind == EMPTY)
            continue;
        if (table[i].pid != seen) {
            seen = table[i].pid;
            started = start_of(seen);
        }
        if (table[i].started != started)
            __atomic_store_n(&table[i].kind, EMPTY, __ATOMIC_SEQ_CST);
    }
}

static int open_table(void)
{
    pthread_mutex_lock(&lock);
    table = private_table;
    const char *path = getenv("FAKE_CUDA_STATE");
    if (path && *path) {
        struct stat status;
        file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
        int failed = file < 0;
        while (!failed && flock(file, LOCK_EX))
            failed = errno != EINTR;
        failed = failed || fstat(file, &status);
        if (!failed && status.st_size < (off_t)sizeof private_table)
            failed = ftruncate(file, sizeof private_table);
        void *mapped = MAP_FAILED;
        if (!failed)
            mapped = mmap(NULL, sizeof private_table, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        if (mapped == MAP_FAILED) {
            if (file >= 0)
                close(file);
            file = -1;
            pthread_mutex_unlock(&lock);
            return OPERATING_SYSTEM;
        }
        table = mapped;
    }
    sweep();
    return OK;
}

static void close_table(void)
{
    if (file >= 0) {
        munmap(table, sizeof private_table);
        close(file);
        file = -1;
    }
    pthread_mutex_unlock(&lock);
}

static uint64_t used_on(int device)
{
    uint64_t used = 0;
    for (int i = 0; i < SLOTS; i++) {
        if (table[i].kind == EMPTY || table[i].device != device)
            continue;
        int counted = 0; /* an allocation that several processes map exists once */
        for (int j = 0; table[i].kind == MAPPING && j < i && !counted; j++)
            counted = table[j].kind == MAPPING && table[j].allocation == table[i].allocation;
        if (!counted)
            used += table[i].bytes;
    }
    return used;
}

static int charge(enum kind kind, int device, uint64_t allocation, uint64_t bytes, int imported)
{
    int code = open_table();
    if (code)
        return code;
    uint64_t total = setting("FAKE_CUDA_MEMORY", (uint64_t)16 << 30), used = used_on(device);
    if (!imported && (used > total || bytes > total - used))
        code = OUT_OF_MEMORY;
    for (int i = 0; !code; i++) {
        if (i == SLOTS) {
            code = OPERATING_SYSTEM;
        } else if (table[i].kind == EMPTY) {
            table[i] = (struct slot){.kind = EMPTY, .device = device, .pid = getpid(),
                                     .started = start_of(getpid()), .allocation = allocation,
                                     .bytes = bytes};
            __atomic_store_n(&table[i].kind, kind, __ATOMIC_SEQ_CST);
            break;
        }
    }
    close_table();
    return code;
}

static void discharge(enum kind kind, int device, uint64_t allocation)
{
    if (open_table())
        return;
    for (int i = 0; i < SLOTS; i++)
        if (table[i].kind == kind && table[i].pid == getpid() && table[i].device == device &&
            table[i].allocation == allocation) {
            __atomic_store_n(&table[i].kind, EMPTY, __ATOMIC_SEQ_CST);
            break;
        }
    close_table();
}

int ledger_charge(int device, uint64_t allocation, uint64_t bytes, int imported)
{
    return charge(MAPPING, device, allocation, bytes, imported);
}

void ledger_discharge(int device, uint64_t allocation)
{
    discharge(MAPPING, device, allocation);
}

int ledger_charge_context(int device, uint64_t bytes)
{
    return charge(CONTEXT, device, 0, bytes, 0);
}

void ledger_discharge_context(int device)
{
    discharge(CONTEXT, device, 0);
}

int ledger_read(int device, uint64_t *unused, uint64_t *total)
{
    int code = open_table();
    if (code)
        return code;
    uint64_t used = used_on(device);
    close_table();
    *total = setting("FAKE_CUDA_MEMORY", (uint64_t)16 << 30);
    *unused = used < *total ? *total - used : 0;
    return OK;
}
