/* A CUDA driver without a GPU: the symbols that protocol/regions/cuda_library.py binds, over shared
 * host memory.
 *
 * Between unrelated processes it behaves as an H200 was measured to: the memory of a killed owner
 * lives on while mapped, imported pointers cannot be exported again, and so on. It is stricter
 * where the real driver is lenient, or says "undefined", and our code must not depend on it; each
 * such place says so. Settings, all optional and read at every call:
 *   FAKE_CUDA_STATE          file in which all processes that name it account for the same devices;
 *                            without it each process has devices of its own
 *   FAKE_CUDA_DEVICES        how many there are (1)
 *   FAKE_CUDA_MEMORY         bytes of each (16 GiB)
 *   FAKE_CUDA_CONTEXT_BYTES  what a process's context costs (64 MiB)
 *   FAKE_CUDA_PINNED         bytes of host memory that a process may pin (no limit)
 *   FAKE_CUDA_ASYNC_MS       how late queued work is done (0)
 *   FAKE_CUDA_FAIL           "cuMemAlloc_v2=2,cuInit=999": what these calls return
 *   FAKE_CUDA_FAIL_FILE      file with the same text, to break a process that runs
 * CUDA_VISIBLE_DEVICES works as in the real driver: ordinals or UUIDs, up to the first that is not
 * there. Owner and importer must be allowed to open each other's /proc/PID/fd (the same uid). */
#define _GNU_SOURCE
#include "fake_cuda.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct context contexts[MAX_DEVICES];
static pid_t initialised; /* CUDA does not survive fork */

#define STACK 32
static __thread struct context *stack[STACK];
static __thread int depth;

int begin(const char *call)
{
    int code = injected(call);
    if (code)
        return code;
    return initialised == getpid() ? OK : NOT_INITIALIZED;
}

int begin_in_context(const char *call, struct context **context)
{
    int code = begin(call);
    if (code)
        return code;
    if (!depth)
        return INVALID_CONTEXT;
    *context = stack[depth - 1];
    return (*context)->retained ? OK : CONTEXT_IS_DESTROYED;
}

/* --- devices: an ordinal is what this process sees, a physical index is the same everywhere --- */

static void write_uuid(unsigned char uuid[16], int physical)
{
    static const unsigned char BASE[16] = {0xfa, 0x4e, 0xc0, 0xda, 0, 0, 0x40, 0, 0x80};
    memcpy(uuid, BASE, 16);
    uuid[15] = (unsigned char)physical;
}

static int physical_named(const char *name, int count)
{
    char *end;
    long index = strtol(name, &end, 10);
    if (*name && !*end)
        return index >= 0 && index < count ? (int)index : -1;
    for (int i = 0; i < count; i++) {
        unsigned char uuid[16];
        char text[41] = "GPU-";
        write_uuid(uuid, i);
        for (int j = 0, at = 4; j < 16; j++)
            at += sprintf(text + at, j >= 4 && j <= 10 && j % 2 == 0 ? "-%02x" : "%02x", uuid[j]);
        if (!strcmp(text, name))
            return i;
    }
    return -1;
}

static int visible_devices(int physical[MAX_DEVICES])
{
    uint64_t wanted = setting("FAKE_CUDA_DEVICES", 1);
    int count = wanted < MAX_DEVICES ? (int)wanted : MAX_DEVICES, seen = 0;
    const char *filter = getenv("CUDA_VISIBLE_DEVICES");
    if (!filter) {
        for (; seen < count; seen++)
            physical[seen] = seen;
        return seen;
    }
    char names[4096], *rest = names;
    snprintf(names, sizeof names, "%s", filter);
    for (char *name; seen < MAX_DEVICES && (name = strtok_r(rest, ", ", &rest)); seen++)
        if ((physical[seen] = physical_named(name, count)) < 0)
            break;
    return seen;
}

static int physical_of(int ordinal, int *physical)
{
    int visible[MAX_DEVICES];
    if (ordinal < 0 || ordinal >= visible_devices(visible))
        return INVALID_DEVICE;
    *physical = visible[ordinal];
    return OK;
}

int cuInit(unsigned flags)
{
    int code = injected("cuInit"), visible[MAX_DEVICES];
    if (code || flags)
        return code ? code : INVALID_VALUE;
    if (!visible_devices(visible))
        return NO_DEVICE;
    initialised = getpid();
    return OK;
}

int cuGetErrorName(int code, const char **name)
{
    *name = result_name(code);
    return *name ? OK : INVALID_VALUE;
}

int cuDriverGetVersion(int *version)
{
    int code = injected("cuDriverGetVersion");
    *version = 13000;
    return code;
}

int cuDeviceGetCount(int *count)
{
    int code = begin("cuDeviceGetCount"), visible[MAX_DEVICES];
    if (!code)
        *count = visible_devices(visible);
    return code;
}

int cuDeviceGet(int *device, int ordinal)
{
    int physical, code = begin("cuDeviceGet");
    if (!code)
        code = physical_of(ordinal, &physical);
    if (!code)
        *device = ordinal;
    return code;
}

int cuDeviceGetName(char *name, int bytes, int device)
{
    int physical, code = begin("cuDeviceGetName");
    if (!code)
        code = physical_of(device, &physical);
    if (!code)
        snprintf(name, (size_t)bytes, "Fake CUDA device %d", physical);
    return code;
}

static int device_uuid(const char *call, unsigned char uuid[16], int device)
{
    int physical, code = begin(call);
    if (!code)
        code = physical_of(device, &physical);
    if (!code)
        write_uuid(uuid, physical);
    return code;
}

int cuDeviceGetUuid_v2(unsigned char uuid[16], int device)
{
    return device_uuid("cuDeviceGetUuid_v2", uuid, device);
}

/* Drivers before CUDA 11.4 have this one only. */
int cuDeviceGetUuid(unsigned char uuid[16], int device)
{
    return device_uuid("cuDeviceGetUuid", uuid, device);
}

/* --- contexts --- */

int cuDevicePrimaryCtxRetain(struct context **context, int device)
{
    int physical, code = begin("cuDevicePrimaryCtxRetain");
    if (!code)
        code = physical_of(device, &physical);
    if (code)
        return code;
    pthread_mutex_lock(&lock);
    if (!contexts[physical].retained) {
        uint64_t cost = setting("FAKE_CUDA_CONTEXT_BYTES", (uint64_t)64 << 20);
        code = ledger_charge_context(physical, cost);
    }
    if (!code) {
        contexts[physical].device = physical;
        contexts[physical].retained++;
    }
    pthread_mutex_unlock(&lock);
    *context = &contexts[physical];
    return code;
}

int cuDevicePrimaryCtxRelease_v2(int device)
{
    int physical, code = begin("cuDevicePrimaryCtxRelease_v2");
    if (!code)
        code = physical_of(device, &physical);
    if (code)
        return code;
    struct context *context = &contexts[physical];
    pthread_mutex_lock(&lock);
    if (!context->retained) {
        code = INVALID_CONTEXT;
    } else if (!--context->retained) {
        drop_mappings(context);
        ledger_discharge_context(physical);
    }
    pthread_mutex_unlock(&lock);
    return code;
}

/* Nothing to enable: any device's memory can be copied from. */
int cuCtxEnablePeerAccess(struct context *peer, unsigned flags)
{
    struct context *context;
    int code = begin_in_context("cuCtxEnablePeerAccess", &context);
    if (code)
        return code;
    if (flags || !peer || peer == context)
        return INVALID_VALUE;
    return peer->retained ? OK : INVALID_CONTEXT;
}

int cuCtxPushCurrent_v2(struct context *context)
{
    int code = begin("cuCtxPushCurrent_v2");
    if (code)
        return code;
    if (!context || depth == STACK)
        return INVALID_VALUE;
    if (!context->retained)
        return CONTEXT_IS_DESTROYED;
    stack[depth++] = context;
    return OK;
}

int cuCtxPopCurrent_v2(struct context **context)
{
    int code = begin("cuCtxPopCurrent_v2");
    if (code)
        return code;
    if (!depth)
        return INVALID_CONTEXT;
    *context = stack[--depth];
    return OK;
}

int cuCtxSynchronize(void)
{
    struct context *context;
    int code = begin_in_context("cuCtxSynchronize", &context);
    if (!code)
        work_wait();
    return code;
}
