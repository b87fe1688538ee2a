/* Pinned host memory and streams of the fake driver.
 *
 * Stricter than the real driver: a copy from a freed buffer delivers garbage for certain, and a
 * stream that was destroyed is refused, never used. */
#define _GNU_SOURCE
#include "fake_cuda.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

struct buffer {
    struct buffer *next;
    unsigned char *base;
    size_t bytes;
};

struct stream {
    struct stream *next;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct buffer *buffers;
static struct stream *streams;
static size_t pinned;

#define PORTABLE 1
#define NON_BLOCKING 1
#define GARBAGE 0xdd

int is_pinned(const void *source, size_t bytes)
{
    int found = 0;
    pthread_mutex_lock(&lock);
    for (struct buffer *buffer = buffers; buffer && !found; buffer = buffer->next) {
        size_t offset = (uintptr_t)source - (uintptr_t)buffer->base; /* huge if it lies before */
        found = offset < buffer->bytes && bytes <= buffer->bytes - offset;
    }
    pthread_mutex_unlock(&lock);
    return found;
}

int is_stream(const void *stream)
{
    pthread_mutex_lock(&lock);
    struct stream *found = streams;
    while (found && found != stream)
        found = found->next;
    pthread_mutex_unlock(&lock);
    return found != NULL;
}

int cuMemHostAlloc(void **pointer, size_t bytes, unsigned flags)
{
    struct context *context;
    int code = begin_in_context("cuMemHostAlloc", &context);
    if (code)
        return code;
    if (!bytes || flags != PORTABLE)
        return INVALID_VALUE;
    struct buffer *buffer = malloc(sizeof *buffer);
    pthread_mutex_lock(&lock);
    void *base = MAP_FAILED;
    if (buffer && pinned + bytes <= setting("FAKE_CUDA_PINNED", UINT64_MAX / 2))
        base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) {
        free(buffer);
        code = OUT_OF_MEMORY;
    } else {
        *buffer = (struct buffer){.next = buffers, .base = base, .bytes = bytes};
        buffers = buffer;
        pinned += bytes;
        *pointer = base;
    }
    pthread_mutex_unlock(&lock);
    return code;
}

int cuMemFreeHost(void *pointer)
{
    struct context *context;
    int code = begin_in_context("cuMemFreeHost", &context);
    if (code)
        return code;
    code = INVALID_VALUE;
    pthread_mutex_lock(&lock);
    for (struct buffer **at = &buffers; *at; at = &(*at)->next) {
        struct buffer *buffer = *at;
        if (buffer->base != pointer)
            continue;
        memset(buffer->base, GARBAGE, buffer->bytes);
        work_wait();
        munmap(buffer->base, buffer->bytes);
        pinned -= buffer->bytes;
        *at = buffer->next;
        free(buffer);
        code = OK;
        break;
    }
    pthread_mutex_unlock(&lock);
    return code;
}

int cuStreamCreate(struct stream **stream, unsigned flags)
{
    struct context *context;
    int code = begin_in_context("cuStreamCreate", &context);
    if (code)
        return code;
    if (flags != NON_BLOCKING)
        return INVALID_VALUE;
    struct stream *new = malloc(sizeof *new);
    if (!new)
        return OUT_OF_MEMORY;
    pthread_mutex_lock(&lock);
    new->next = streams;
    *stream = streams = new;
    pthread_mutex_unlock(&lock);
    return OK;
}

/* Like the real one it does not wait for the work that is queued. */
int cuStreamDestroy_v2(struct stream *stream)
{
    struct context *context;
    int code = begin_in_context("cuStreamDestroy_v2", &context);
    if (code)
        return code;
    code = INVALID_HANDLE;
    pthread_mutex_lock(&lock);
    for (struct stream **at = &streams; *at; at = &(*at)->next) {
        if (*at != stream)
            continue;
        *at = stream->next;
        free(stream);
        code = OK;
        break;
    }
    pthread_mutex_unlock(&lock);
    return code;
}

int cuStreamSynchronize(struct stream *stream)
{
    struct context *context;
    int code = begin_in_context("cuStreamSynchronize", &context);
    if (code)
        return code;
    if (!is_stream(stream))
        return INVALID_HANDLE;
    work_wait();
    return OK;
}

/* For tests, which look for what was left behind: no calls of the real driver. */
uint64_t fake_cuda_pinned_bytes(void)
{
    pthread_mutex_lock(&lock);
    uint64_t bytes = pinned;
    pthread_mutex_unlock(&lock);
    return bytes;
}

int fake_cuda_streams(void)
{
    int count = 0;
    pthread_mutex_lock(&lock);
    for (struct stream *stream = streams; stream; stream = stream->next)
        count++;
    pthread_mutex_unlock(&lock);
    return count;
}
