/* What the parts of the fake CUDA driver share: result codes, settings, devices. */
#ifndef FAKE_CUDA_H
#define FAKE_CUDA_H

#include <stddef.h>
#include <stdint.h>

enum {
    OK = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    CUDA_MAP_FAILED = 205,
    ALREADY_MAPPED = 208,
    OPERATING_SYSTEM = 304,
    INVALID_HANDLE = 400,
    CONTEXT_IS_DESTROYED = 709,
};

#define MAX_DEVICES 64
#define GRANULARITY ((uint64_t)2 << 20)

/* The driver's symbols are visible; what its parts call is not, others may use the same names. */
#pragma GCC visibility push(hidden)

struct context {
    int device; /* physical index */
    int retained;
};

/* fake_cuda.c: what every call begins with; OK, or what it returns. */
int begin(const char *call);
int begin_in_context(const char *call, struct context **context);

/* memory.c */
void drop_mappings(struct context *context);

/* host_memory.c */
int is_pinned(const void *source, size_t bytes);
int is_stream(const void *stream);

/* settings.c: read at every call, so that a test may change them in a running process. */
uint64_t setting(const char *name, uint64_t otherwise);
int injected(const char *call); /* the code that a test wants this call to return, or OK */
const char *result_name(int code);

/* ledger.c: device memory in use, over all processes. A device is named by its physical index. */
int ledger_charge(int device, uint64_t allocation, uint64_t bytes, int imported);
void ledger_discharge(int device, uint64_t allocation);
int ledger_charge_context(int device, uint64_t bytes);
void ledger_discharge_context(int device);
int ledger_read(int device, uint64_t *unused, uint64_t *total);

/* work_queue.c: what every stream does, in one order. */
int work_enqueue_set(unsigned char *target, unsigned char value, size_t bytes);
int work_enqueue_word(unsigned char *target, uint32_t word);
int work_enqueue_copy(unsigned char *target, const unsigned char *source, size_t bytes);
void work_wait(void);

#pragma GCC visibility pop

#endif
