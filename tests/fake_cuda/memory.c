/* Device memory of the fake driver: a memfd per allocation, which other processes map as well. */
#define _GNU_SOURCE
#include "fake_cuda.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

typedef uint64_t CUdeviceptr;

struct mapping {
    struct mapping *next;
    unsigned char *base;
    uint64_t bytes;
    uint64_t allocation; /* random id, the same in all processes that map it */
    int file;            /* -1: imported */
    int device;          /* where the memory is */
    struct context *context; /* which dies with this mapping */
};

/* 64 bytes, like CUipcMemHandle; passed by value like it. */
struct handle {
    uint64_t magic;
    int32_t pid, file;
    uint64_t bytes, filesystem, inode, allocation;
    int32_t device, zero;
    uint64_t checksum;
};
_Static_assert(sizeof(struct handle) == 64, "a CUDA IPC memory handle has 64 bytes");

#define MAGIC 0x3143504955434b46u

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct mapping *mappings;

#define BEGIN(call)                                 \
    struct context *context;                        \
    do {                                            \
        int code_ = begin_in_context(call, &context); \
        if (code_)                                  \
            return code_;                           \
    } while (0)

static void unmap(struct mapping *mapping)
{
    work_wait();
    munmap(mapping->base, mapping->bytes);
    if (mapping->file >= 0)
        close(mapping->file);
    ledger_discharge(mapping->device, mapping->allocation);
    free(mapping);
}

void drop_mappings(struct context *context)
{
    pthread_mutex_lock(&lock);
    for (struct mapping **at = &mappings; *at;) {
        struct mapping *mapping = *at;
        if (mapping->context != context) {
            at = &mapping->next;
            continue;
        }
        *at = mapping->next;
        unmap(mapping);
    }
    pthread_mutex_unlock(&lock);
}

int cuMemGetInfo_v2(size_t *unused, size_t *total)
{
    BEGIN("cuMemGetInfo_v2");
    return ledger_read(context->device, unused, total);
}

/* Maps the file `source`; the caller keeps or closes it. The lock must be held. */
static int map(int source, struct mapping new, CUdeviceptr *pointer)
{
    struct mapping *mapping = malloc(sizeof *mapping);
    void *base = mmap(NULL, new.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, source, 0);
    if (!mapping || base == MAP_FAILED) {
        if (base != MAP_FAILED)
            munmap(base, new.bytes);
        free(mapping);
        return CUDA_MAP_FAILED;
    }
    *mapping = new;
    mapping->base = base;
    mapping->next = mappings;
    mappings = mapping;
    *pointer = (CUdeviceptr)(uintptr_t)base;
    return OK;
}

static uint64_t whole(uint64_t bytes)
{
    return (bytes + GRANULARITY - 1) / GRANULARITY * GRANULARITY;
}

int cuMemAlloc_v2(CUdeviceptr *pointer, size_t bytes)
{
    BEGIN("cuMemAlloc_v2");
    uint64_t allocation;
    if (!bytes)
        return INVALID_VALUE;
    if (bytes > UINT64_MAX / 2)
        return OUT_OF_MEMORY;
    if (getrandom(&allocation, sizeof allocation, 0) != sizeof allocation)
        return OPERATING_SYSTEM;
    int code = ledger_charge(context->device, allocation, whole(bytes), 0);
    if (code)
        return code;
    int file = memfd_create("fake_cuda", MFD_CLOEXEC);
    code = file < 0 || ftruncate(file, (off_t)bytes) ? OPERATING_SYSTEM : OK;
    if (!code) {
        struct mapping new = {.bytes = bytes, .allocation = allocation, .file = file,
                              .device = context->device, .context = context};
        pthread_mutex_lock(&lock);
        code = map(file, new, pointer);
        pthread_mutex_unlock(&lock);
    }
    if (code) {
        if (file >= 0)
            close(file);
        ledger_discharge(context->device, allocation);
    }
    return code;
}

/* Removes the mapping that begins at `pointer`, which must be imported or own as asked. */
static int drop(CUdeviceptr pointer, int imported)
{
    int code = INVALID_VALUE;
    pthread_mutex_lock(&lock);
    for (struct mapping **at = &mappings; *at; at = &(*at)->next) {
        struct mapping *mapping = *at;
        if ((uintptr_t)mapping->base != pointer || (mapping->file < 0) != imported)
            continue;
        *at = mapping->next;
        unmap(mapping);
        code = OK;
        break;
    }
    pthread_mutex_unlock(&lock);
    return code;
}

/* This and cuPointerGetAttribute are stricter than the real driver, which needs no context here. */
int cuMemFree_v2(CUdeviceptr pointer)
{
    BEGIN("cuMemFree_v2");
    return drop(pointer, 0);
}

static uint64_t checksum(const struct handle *handle)
{
    uint64_t sum = 0xcbf29ce484222325u;
    for (size_t i = 0; i < offsetof(struct handle, checksum); i++)
        sum = (sum ^ ((const unsigned char *)handle)[i]) * 0x100000001b3u;
    return sum;
}

int cuIpcGetMemHandle(struct handle *handle, CUdeviceptr pointer)
{
    BEGIN("cuIpcGetMemHandle");
    int code = INVALID_VALUE;
    struct stat status;
    pthread_mutex_lock(&lock);
    for (struct mapping *mapping = mappings; mapping; mapping = mapping->next) {
        /* Stricter than the real driver, which gives the whole underlying allocation's handle for a
         * pointer into it, and packs allocations below 2 MiB together: an importer gets neither as
         * it was meant. */
        if ((uintptr_t)mapping->base != pointer || mapping->file < 0 ||
            mapping->bytes < GRANULARITY || fstat(mapping->file, &status))
            continue;
        *handle = (struct handle){.magic = MAGIC, .pid = getpid(), .file = mapping->file,
                                  .bytes = mapping->bytes,
                                  .filesystem = status.st_dev, .inode = status.st_ino,
                                  .allocation = mapping->allocation, .device = mapping->device};
        handle->checksum = checksum(handle);
        code = OK;
    }
    pthread_mutex_unlock(&lock);
    return code;
}

int cuIpcOpenMemHandle_v2(CUdeviceptr *pointer, struct handle handle, unsigned flags)
{
    BEGIN("cuIpcOpenMemHandle_v2");
    if (flags != 1 || handle.magic != MAGIC || handle.checksum != checksum(&handle))
        return INVALID_VALUE;
    if (handle.pid == getpid())
        return INVALID_CONTEXT;
    /* If the owner has gone, an H200's driver refuses like this too; what it does for a freed
     * allocation is promised nowhere. The file may be another by now: hence the inode. */
    char path[64];
    struct stat status;
    snprintf(path, sizeof path, "/proc/%d/fd/%d", handle.pid, handle.file);
    int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0)
        return INVALID_HANDLE;
    int code = INVALID_HANDLE;
    if (!fstat(file, &status) && status.st_dev == handle.filesystem &&
        status.st_ino == handle.inode && (uint64_t)status.st_size == handle.bytes) {
        struct mapping new = {.bytes = handle.bytes, .allocation = handle.allocation, .file = -1,
                              .device = handle.device, .context = context};
        code = OK;
        pthread_mutex_lock(&lock);
        /* Stricter than the real driver, which counts: it shows that our code counts its users. */
        for (struct mapping *mapping = mappings; mapping; mapping = mapping->next)
            if (mapping->allocation == handle.allocation)
                code = ALREADY_MAPPED;
        if (!code)
            code = ledger_charge(handle.device, handle.allocation, whole(handle.bytes), 1);
        if (!code && (code = map(file, new, pointer)))
            ledger_discharge(handle.device, handle.allocation);
        pthread_mutex_unlock(&lock);
    }
    close(file);
    return code;
}

int cuIpcCloseMemHandle(CUdeviceptr pointer)
{
    BEGIN("cuIpcCloseMemHandle");
    return drop(pointer, 1);
}

/* The host address of a device range, NULL if it lies in no mapping; the lock must be held. */
static unsigned char *locate(CUdeviceptr pointer, size_t bytes)
{
    for (struct mapping *mapping = mappings; mapping; mapping = mapping->next) {
        uint64_t offset = pointer - (uintptr_t)mapping->base; /* huge if it lies before */
        if (offset < mapping->bytes && bytes <= mapping->bytes - offset)
            return (unsigned char *)(uintptr_t)pointer;
    }
    return NULL;
}

static unsigned char *locate_alone(CUdeviceptr pointer, size_t bytes)
{
    pthread_mutex_lock(&lock);
    unsigned char *found = locate(pointer, bytes);
    pthread_mutex_unlock(&lock);
    return found;
}

int cuMemcpyHtoD_v2(CUdeviceptr target, const void *source, size_t bytes)
{
    BEGIN("cuMemcpyHtoD_v2");
    unsigned char *found = locate_alone(target, bytes);
    if (!found)
        return INVALID_VALUE;
    work_wait();
    memcpy(found, source, bytes);
    return OK;
}

/* Stricter than the real driver, which copies from pageable memory as well, but not by itself. */
int cuMemcpyHtoDAsync_v2(CUdeviceptr target, const void *source, size_t bytes, void *stream)
{
    BEGIN("cuMemcpyHtoDAsync_v2");
    if (!is_stream(stream))
        return INVALID_HANDLE;
    if (!is_pinned(source, bytes))
        return INVALID_VALUE;
    pthread_mutex_lock(&lock);
    unsigned char *to = locate(target, bytes);
    int code = to ? work_enqueue_copy(to, source, bytes) : INVALID_VALUE;
    pthread_mutex_unlock(&lock);
    return code;
}

int cuMemcpyDtoH_v2(void *target, CUdeviceptr source, size_t bytes)
{
    BEGIN("cuMemcpyDtoH_v2");
    unsigned char *found = locate_alone(source, bytes);
    if (!found)
        return INVALID_VALUE;
    work_wait();
    memcpy(target, found, bytes);
    return OK;
}

/* Queued under the lock, so that `drop` waits for it. */
int cuMemcpyDtoD_v2(CUdeviceptr target, CUdeviceptr source, size_t bytes)
{
    BEGIN("cuMemcpyDtoD_v2");
    pthread_mutex_lock(&lock);
    unsigned char *to = locate(target, bytes), *from = locate(source, bytes);
    int code = to && from ? work_enqueue_copy(to, from, bytes) : INVALID_VALUE;
    pthread_mutex_unlock(&lock);
    return code;
}

/* What is copied may lie anywhere: a CPU tensor stands for memory of torch's on the device. */
int cuMemcpyDtoDAsync_v2(CUdeviceptr target, CUdeviceptr source, size_t bytes, void *stream)
{
    BEGIN("cuMemcpyDtoDAsync_v2");
    if (!is_stream(stream))
        return INVALID_HANDLE;
    pthread_mutex_lock(&lock);
    unsigned char *to = locate(target, bytes);
    const unsigned char *from = (const unsigned char *)(uintptr_t)source;
    int code = to ? work_enqueue_copy(to, from, bytes) : INVALID_VALUE;
    pthread_mutex_unlock(&lock);
    return code;
}

int cuStreamWriteValue32_v2(void *stream, CUdeviceptr target, unsigned value, unsigned flags)
{
    BEGIN("cuStreamWriteValue32_v2");
    if (!is_stream(stream))
        return INVALID_HANDLE;
    pthread_mutex_lock(&lock);
    unsigned char *to = target % 4 || flags ? NULL : locate(target, 4);
    int code = to ? work_enqueue_word(to, value) : INVALID_VALUE;
    pthread_mutex_unlock(&lock);
    return code;
}

/* CUstreamBatchMemOpParams, of which each operation here has these parts. */
struct value_operation {
    int operation;
    CUdeviceptr address;
    uint64_t value;
    unsigned flags;
    uint64_t rest[2];
};
_Static_assert(sizeof(struct value_operation) == 48, "the driver's union has 48 bytes");

/* The caller waits, not its stream: what computes on this "device" is the caller's CPU. */
static int wait_for_value(const struct value_operation *wait)
{
    unsigned char *found = wait->address % 4 ? NULL : locate_alone(wait->address, 4);
    if (!found || wait->flags != 1)
        return INVALID_VALUE;
    work_wait();
    const struct timespec pause = {.tv_nsec = 50000};
    while (__atomic_load_n((uint32_t *)found, __ATOMIC_ACQUIRE) != (uint32_t)wait->value)
        nanosleep(&pause, NULL);
    return OK;
}

int cuStreamBatchMemOp_v2(void *stream, unsigned count, struct value_operation *each, unsigned flags)
{
    BEGIN("cuStreamBatchMemOp_v2");
    int code = !count || count > 256 || flags ? INVALID_VALUE : OK;
    for (unsigned i = 0; i < count && !code; i++)
        if (each[i].operation == 1)
            code = is_stream(stream) ? wait_for_value(&each[i]) : INVALID_HANDLE;
        else if (each[i].operation == 2)
            code = cuStreamWriteValue32_v2(stream, each[i].address, (unsigned)each[i].value,
                                           each[i].flags);
        else
            code = INVALID_VALUE;
    return code;
}

int cuMemsetD8Async(CUdeviceptr target, unsigned char value, size_t bytes, void *stream)
{
    (void)stream; /* every stream is the legacy one */
    BEGIN("cuMemsetD8Async");
    pthread_mutex_lock(&lock);
    unsigned char *to = locate(target, bytes);
    int code = to ? work_enqueue_set(to, value, bytes) : INVALID_VALUE;
    pthread_mutex_unlock(&lock);
    return code;
}

int cuPointerGetAttribute(void *data, int attribute, CUdeviceptr pointer)
{
    BEGIN("cuPointerGetAttribute");
    if (attribute != 2 || !locate_alone(pointer, 1))
        return INVALID_VALUE;
    *(unsigned *)data = 1; /* CU_MEMORYTYPE_HOST: the truth, whoever dereferences it is right */
    return OK;
}
